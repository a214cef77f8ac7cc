import { expect, test } from 'vitest';
import { readDevices } from '../../../lib/qmp/job-devices.js';

const node = (id: number, name: string, type = 'block-driver') => ({ id, name, type });
const edge = (parent: number, child: number, name: string) => ({ parent, child, name });

test('a guest’s device above the job’s filter comes before the node below it', () => {
  const nodes = [node(1, 'drive0', 'block-backend'), node(2, '#filter'), node(3, 'disk'), node(4, 'job', 'block-job')];
  const edges = [edge(1, 2, 'root'), edge(2, 3, 'file'), edge(4, 2, 'main node'), edge(4, 3, 'active node')];
  expect(readDevices({ nodes, edges })).toEqual(new Map([['job', 'drive0']]));
});

test('a device is called by the id that it was given, if it was given one', () => {
  const named = (name: string) => {
    const nodes = [node(1, name, 'block-backend'), node(2, 'disk'), node(4, 'job', 'block-job')];
    return readDevices({ nodes, edges: [edge(1, 2, 'root'), edge(4, 2, 'main node')] }).get('job');
  };
  expect(named('/machine/peripheral/disk0/virtio-backend')).toBe('disk0');
  expect(named('/machine/peripheral/disk0')).toBe('disk0');
  expect(named('/machine/peripheral-anon/device[1]')).toBe('/machine/peripheral-anon/device[1]');
});

test('without one it is the first node that somebody named', () => {
  const nodes = [node(1, '', 'block-backend'), node(2, '#filter'), node(3, '#inner'), node(5, 'disk'), node(4, 'job', 'block-job')];
  const edges = [edge(1, 2, 'root'), edge(2, 3, 'file'), edge(3, 5, 'file'), edge(4, 2, 'main node')];
  expect(readDevices({ nodes, edges })).toEqual(new Map([['job', 'disk']]));
});

test('a loop in the graph is not followed for ever; a job without names has none', () => {
  const nodes = [node(2, '#a'), node(3, '#b'), node(4, 'job', 'block-job')];
  const edges = [edge(2, 3, 'file'), edge(3, 2, 'file'), edge(4, 2, 'main node')];
  expect(readDevices({ nodes, edges })).toEqual(new Map());
});

test.each([undefined, null, [], {}, { nodes: 1, edges: {} }, { nodes: [null, { id: 'a' }], edges: [1, { parent: 'x' }] }])(
  '%j tells nothing',
  (graph) => expect(readDevices(graph)).toEqual(new Map()),
);
