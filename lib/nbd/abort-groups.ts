/**
 * Members of signals, with one listener for each signal however many members it has: Node warns of
 * a leak at more than ten (v20), and hundreds of requests may share one.
 */
export class AbortGroups<T> {
  private readonly groups = new Map<AbortSignal, { members: Set<T>; listener: () => void }>();

  /** `aborted` is called for each member of a signal that aborts. */
  constructor(private readonly aborted: (member: T) => void) {}

  /** The signal must not be aborted yet. */
  join(signal: AbortSignal, member: T): void {
    const group = this.groups.get(signal);
    if (group) {
      group.members.add(member);
      return;
    }
    const members = new Set([member]);
    const listener = () => members.forEach(this.aborted);
    this.groups.set(signal, { members, listener });
    signal.addEventListener('abort', listener, { once: true });
  }

  leave(signal: AbortSignal, member: T): void {
    const group = this.groups.get(signal);
    if (!group?.members.delete(member) || group.members.size > 0) return;
    this.groups.delete(signal);
    signal.removeEventListener('abort', group.listener);
  }
}
