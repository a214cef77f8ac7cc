import { parseArgs } from 'node:util';

const { values } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    check: { type: 'boolean', default: false },
    'rivals-only': { type: 'boolean', default: false },
    trials: { type: 'string' },
    only: { type: 'string' },
  },
});

/**
 * --quick: a small slice, its results kept apart. --check: exit 1 if a limit is missed.
 * --rivals-only: without thicken, to try the rest. --only: some of a file's benchmarks, by name.
 */
export const options = {
  quick: values.quick,
  check: values.check,
  rivalsOnly: values['rivals-only'],
  only: values.only?.split(','),
  trials: Number(values.trials ?? (values.quick ? 3 : 5)),
};

/** Whether --only asks for a benchmark: one of its words is part of the name. */
export function isWanted(name) {
  return options.only === undefined || options.only.some((word) => name.includes(word));
}
