/** `node scripts/require-complete.mjs REPORT`: fails unless every test of a vitest JSON report ran and passed. */
import { readFileSync } from 'node:fs';

const report = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const tests = report.testResults.flatMap(({ name, assertionResults }) =>
  assertionResults.map(({ fullName, status }) => ({ name: `${name}: ${fullName}`, status })),
);
const passed = tests.filter(({ status }) => status === 'passed');
const failed = tests.filter(({ status }) => status === 'failed');
const left = tests.filter(({ status }) => status !== 'passed' && status !== 'failed');

for (const { name, status } of [...failed, ...left]) process.stdout.write(`${status}: ${name}\n`);
process.stdout.write(`${passed.length} passed, ${failed.length} failed, ${left.length} skipped\n`);
process.exitCode = report.success && passed.length > 0 && passed.length === tests.length ? 0 : 1;
