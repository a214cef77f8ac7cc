await import('./startup.mjs');
await import('./scan.mjs');
await import('./fill.mjs');
await import('./qcow2.mjs');
await import('./live.mjs');
await import('./offline.mjs');
