import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { repository } from '../support/processes.js';

const text = (name: string): string => readFileSync(join(repository, name), 'utf8');
const sourcesIn = (names: string): string[] => [...names.matchAll(/native\/[\w/-]+\.cc/g)].map(([name]) => name).sort();

const gyp = JSON.parse(text('binding.gyp').replaceAll('\\"', "'")) as {
  targets: { sources: string[]; defines: string[] }[];
};
const listed = gyp.targets.flatMap(({ sources }) => sources).sort();

it('cmake-js and node-gyp build the same sources', () => {
  expect(sourcesIn(text('CMakeLists.txt'))).toEqual(listed);
});

it('cmake-js and node-gyp define the same', () => {
  const block = /add_compile_definitions\(([^)]*)\)/.exec(text('CMakeLists.txt').replace(/#.*/g, ''))?.[1] ?? '';
  const defined = block.trim().split(/\s+/);
  expect(defined.sort()).toEqual(gyp.targets.flatMap(({ defines }) => defines).sort());
});

it('all sources but the tests are built', () => {
  const all = readdirSync(join(repository, 'native'), { recursive: true, encoding: 'utf8' });
  const sources = all.filter((name) => name.endsWith('.cc') && !name.startsWith('test/'));
  expect(listed).toEqual(sources.map((name) => `native/${name}`).sort());
});
