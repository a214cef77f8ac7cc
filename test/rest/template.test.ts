/** A disk made of a template on a server, until the server is not needed any more. */
import { describe, expect, it } from 'vitest';
import { startGuest } from '../support/guest.js';
import { requires } from '../support/requirements.js';
import { withDaemon } from './helpers.js';
const runnable = withDaemon && requires({ guest: true, tools: ['nbdkit'] });
describe.runIf(runnable)('x', () => { it('y', async () => { expect(startGuest).toBeDefined(); }); });
