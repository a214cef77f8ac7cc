/** A qcow2 image's own map, with that of the layers below where they have the content. */
import type { ExtentPage } from '../extent.js';
import type { ExtentSource } from '../extent-source.js';
import { BELOW } from '../mapped.js';
import type { CancelFlag } from '../native.js';
import { PageBuilder } from '../page-builder.js';
import type { ByteRange } from '../types.js';

export class BackedExtents implements ExtentSource {
  constructor(
    private readonly own: ExtentSource,
    /** Of the same disk, without the image itself. */
    private readonly below: ExtentSource,
  ) {}

  get method() {
    return this.own.method;
  }

  get filesystem() {
    return this.own.filesystem;
  }

  get file() {
    return this.own.file;
  }

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    for await (const page of this.own.pages(range, cancel)) {
      const span = spanBelow(page);
      if (span) yield* joined(page, this.below.pages(span, cancel));
      else yield page;
    }
  }

  /** Both belong to whoever opened them. */
  async [Symbol.asyncDispose](): Promise<void> {}
}

/** What is around all that comes from below; null where nothing does. */
function spanBelow({ offset, length, state }: ExtentPage): ByteRange | null {
  const first = state.indexOf(BELOW);
  if (first < 0) return null;
  const last = state.lastIndexOf(BELOW);
  return { offset: offset[first]!, length: offset[last]! + length[last]! - offset[first]! };
}

/** `page` with each part that comes from below as `below` tells it. Pages of `below` bound the memory. */
async function* joined(page: ExtentPage, below: AsyncIterable<ExtentPage>): AsyncGenerator<ExtentPage, void, undefined> {
  let i = 0;
  for await (const part of below) {
    const pieces = new PageBuilder();
    for (let j = 0; j < part.offset.length; j++) {
      const [start, end] = [part.offset[j]!, part.offset[j]! + part.length[j]!];
      for (; i < page.offset.length && page.offset[i]! < end; i++) {
        const last = page.offset[i]! + page.length[i]!;
        if (page.state[i] !== BELOW) {
          pieces.addWhole(page, i);
          continue;
        }
        const from = Math.max(page.offset[i]!, start);
        pieces.add(from, Math.min(last, end) - from, part, j);
        // The next part has the rest of it.
        if (last > end) break;
      }
    }
    if (pieces.count > 0) yield pieces.page();
  }
  const rest = new PageBuilder();
  for (; i < page.offset.length; i++) rest.addWhole(page, i);
  if (rest.count > 0) yield rest.page();
}
