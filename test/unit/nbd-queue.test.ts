import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Queue, Queued } from '../../lib/nbd/queue.js';

class Item extends Queued {
  constructor(readonly number: number) {
    super();
  }
}

test('a queue keeps the order of an array, whatever leaves it', () => {
  const moves = fc.array(fc.oneof(fc.constant('push' as const), fc.nat(20)), { maxLength: 200 });
  fc.assert(
    fc.property(moves, (list) => {
      const queue = new Queue<Item>();
      const items: Item[] = [];
      let model: Item[] = [];
      for (const move of list) {
        if (move === 'push') {
          const item = new Item(items.length);
          items.push(item);
          model.push(item);
          queue.push(item);
        } else {
          // Also those that have left already.
          const item = items[move % (items.length || 1)];
          if (item) queue.remove(item);
          model = model.filter((other) => other !== item);
        }
        expect(queue.first).toBe(model[0]);
      }
      for (const item of model) {
        expect(queue.first).toBe(item);
        queue.remove(item);
      }
      expect(queue.first).toBeUndefined();
    }),
  );
});
