import { extentOf, type Extent, type ExtentPage } from './extent.js';

/**
 * Extents one at a time. Not a generator: with a promise that is resolved already, an entry costs
 * the loop one turn of the microtask queue instead of three.
 */
export class ExtentIterator implements AsyncIterableIterator<Extent> {
  private page: ExtentPage | undefined;
  private index = 0;

  constructor(private readonly pages: AsyncGenerator<ExtentPage, void, undefined>) {}

  next(): Promise<IteratorResult<Extent>> {
    const { page } = this;
    if (!page || this.index >= page.state.length) return this.nextPage();
    return Promise.resolve({ value: this.take(page), done: false });
  }

  private take(page: ExtentPage): Extent {
    return extentAt(page, this.index++);
  }

  private async nextPage(): Promise<IteratorResult<Extent>> {
    const { value, done } = await this.pages.next();
    if (done || !value) return { value: undefined, done: true };
    this.page = value;
    this.index = 0;
    return this.next();
  }

  async return(): Promise<IteratorResult<Extent>> {
    await this.pages.return();
    return { value: undefined, done: true };
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}

/** Those of one page. */
export function* extentsOf(page: ExtentPage): Generator<Extent> {
  for (let i = 0; i < page.state.length; i++) yield extentAt(page, i);
}

function extentAt({ offset, length, state, flags, depth, host }: ExtentPage, i: number): Extent {
  const extent = extentOf(offset[i]!, length[i]!, state[i]!, flags[i]!, depth?.[i]);
  if (host && host[i]! >= 0) extent.at = host[i]!;
  return extent;
}
