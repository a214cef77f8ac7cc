/** Pages of extents, put together one by one. */
import type { ExtentPage } from './extent.js';

export class PageBuilder {
  private readonly offset: number[] = [];
  private readonly length: number[] = [];
  private readonly state: number[] = [];
  private readonly flags: number[] = [];
  private readonly depth: number[] = [];
  private readonly host: number[] = [];

  get count(): number {
    return this.offset.length;
  }

  /** A range with what entry `j` of a page says of it; `host`: where it lies, if that is known better. */
  add(offset: number, length: number, page: ExtentPage, j: number, host = page.host?.[j] ?? -1): void {
    this.offset.push(offset);
    this.length.push(length);
    this.state.push(page.state[j]!);
    this.flags.push(page.flags[j]!);
    this.depth.push(page.depth?.[j] ?? 0);
    this.host.push(host);
  }

  addWhole(page: ExtentPage, j: number): void {
    this.add(page.offset[j]!, page.length[j]!, page, j);
  }

  page(): ExtentPage {
    return {
      offset: Float64Array.from(this.offset),
      length: Float64Array.from(this.length),
      state: Uint8Array.from(this.state),
      flags: Uint32Array.from(this.flags),
      depth: Uint32Array.from(this.depth),
      host: Float64Array.from(this.host),
    };
  }
}
