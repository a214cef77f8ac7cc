import { describe, expect, test } from 'vitest';
import { SchemaIndex } from '../../../lib/qmp/schema.js';

const index = new SchemaIndex([
  { 'meta-type': 'command', name: 'add', 'arg-type': '1', 'ret-type': '0' },
  { 'meta-type': 'command', name: 'bare', 'arg-type': '0', 'ret-type': '0' },
  { 'meta-type': 'event', name: 'STOP', 'arg-type': '0' },
  { 'meta-type': 'object', name: '0', members: [] },
  {
    'meta-type': 'object',
    name: '1',
    members: [
      { name: 'type', type: '2' },
      { name: 'nodes', type: '[3]' },
      { name: 'either', type: '4' },
    ],
    tag: 'type',
    variants: [
      { case: 'nbd', type: '5' },
      { case: 'fuse', type: '0' },
    ],
  },
  { 'meta-type': 'enum', name: '2', members: [{ name: 'nbd' }, { name: 'fuse' }], values: ['nbd', 'fuse'] },
  { 'meta-type': 'array', name: '[3]', 'element-type': '3' },
  { 'meta-type': 'object', name: '3', members: [{ name: 'child', type: '4' }] },
  { 'meta-type': 'alternate', name: '4', members: [{ type: 'str' }, { type: '1' }] },
  { 'meta-type': 'object', name: '5', members: [{ name: 'allocation-depth', type: 'bool' }] },
  { 'meta-type': 'enum', name: '6', values: ['old'] },
  { 'meta-type': 'something new', name: '7' },
  'nonsense',
]);

describe('SchemaIndex', () => {
  test.each([
    ['add', 'type', true],
    ['add', 'allocation-depth', true],
    ['add', 'child', false],
    ['add', 'nodes.child', true],
    ['add', 'either.nodes.child', true],
    // An object that holds itself, through a list and an alternate.
    ['add', 'nodes.child.nodes.child.allocation-depth', true],
    ['add', 'allocation-depth.more', false],
    ['add', '', false],
    ['bare', 'type', false],
    ['absent', 'type', false],
    // An event is no command.
    ['STOP', 'type', false],
  ])('%s takes %s: %s', (command, path, expected) => {
    expect(index.hasArgument(command, path)).toBe(expected);
  });

  test('knows the words that an argument may be', () => {
    expect(index.hasArgument('add', 'type', 'fuse')).toBe(true);
    expect(index.hasArgument('add', 'type', 'vduse')).toBe(false);
    expect(index.hasArgument('add', 'allocation-depth', 'true')).toBe(false);
    expect(index.hasArgument('add', 'absent', 'fuse')).toBe(false);
  });

  test('refuses what is no list', () => {
    expect(() => new SchemaIndex({})).toThrow(TypeError);
    expect(() => new SchemaIndex(null)).toThrow(TypeError);
  });

  test('an unsound schema is one that knows less', () => {
    const poor = new SchemaIndex([{ 'meta-type': 'command', name: 'add', 'arg-type': 5 }, { 'meta-type': 'object', name: '1' }]);
    expect(poor.hasArgument('add', 'type')).toBe(false);
  });
});
