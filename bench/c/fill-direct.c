/* Writes zeros over every hole as dd does: O_DIRECT, 8 MiB, one at a time; counts the holes. */
#include "common.h"

enum { CHUNK = 8 * 1024 * 1024, ALIGNMENT = 4096 };

static void write_zeros(int fd, const void* zeros, const struct range* hole) {
  for (uint64_t done = 0; done < hole->length;) {
    uint64_t left = hole->length - done;
    ssize_t n = pwrite(fd, zeros, left < CHUNK ? left : CHUNK, (off_t)(hole->offset + done));
    if (n <= 0) die("pwrite");
    done += (uint64_t)n;
  }
}

int main(int argc, char** argv) {
  int with_fsync = wants_fsync(argc, argv);
  double begin = now();
  int fd = open_file(argv[1], O_RDWR | O_DIRECT);
  void* zeros = NULL;
  if (posix_memalign(&zeros, ALIGNMENT, CHUNK) != 0) die("posix_memalign");
  memset(zeros, 0, CHUNK);
  struct ranges holes = find_holes(fd);
  for (size_t i = 0; i < holes.count; i++) write_zeros(fd, zeros, &holes.items[i]);
  if (with_fsync) sync_file(fd);
  close(fd);
  report(begin, holes.count);
  return 0;
}
