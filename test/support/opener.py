"""
A foreign writer that opens FILE at a chosen moment of a run: DELAY microseconds after the run has
taken QEMU's lock bytes, which is just before it proves that it is alone. It heeds no lock, writes
the last 4 KiB, says what it did and stays until it is killed.
"""
import fcntl
import os
import struct
import sys
import time

F_OFD_GETLK = 36
LAST_TAKEN = 203
path, delay = sys.argv[1], int(sys.argv[2]) / 1e6


def taken(fd):
    probe = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, LAST_TAKEN, 1, 0)
    return struct.unpack("hhqqi", fcntl.fcntl(fd, F_OFD_GETLK, probe))[0] != fcntl.F_UNLCK


reader = os.open(path, os.O_RDONLY)
print("ready", flush=True)
while not taken(reader):
    pass
until = time.perf_counter() + delay
while time.perf_counter() < until:
    pass
writer = os.open(path, os.O_RDWR)
os.pwrite(writer, b"\x5a" * 4096, os.fstat(writer).st_size - 4096)
print("opened", flush=True)
time.sleep(600)
