interface Links {
  before: Links;
  after: Links;
}

/** An item of a {@link Queue}; it is in one queue at a time. */
export abstract class Queued implements Links {
  before: Links = this;
  after: Links = this;
}

/**
 * First in, first out, and any item can leave from the middle, each in constant time. (A Set looks
 * through all that was deleted before it finds its first item.)
 */
export class Queue<T extends Queued> {
  private readonly ends: Links;

  constructor() {
    const ends = {} as Links;
    this.ends = Object.assign(ends, { before: ends, after: ends });
  }

  get first(): T | undefined {
    return this.ends.after === this.ends ? undefined : (this.ends.after as T);
  }

  push(item: T): void {
    item.before = this.ends.before;
    item.after = this.ends;
    item.before.after = item;
    this.ends.before = item;
  }

  /** Does nothing to an item that is in no queue. */
  remove(item: T): void {
    item.before.after = item.after;
    item.after.before = item.before;
    item.before = item.after = item;
  }
}
