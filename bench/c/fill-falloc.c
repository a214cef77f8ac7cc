/* Scans, allocates hole by hole, and scans again; counts the holes. */
#include "common.h"

int main(int argc, char** argv) {
  int with_fsync = wants_fsync(argc, argv);
  double begin = now();
  int fd = open_file(argv[1], O_RDWR);
  struct ranges holes = find_holes(fd);
  for (size_t i = 0; i < holes.count; i++) {
    const struct range* hole = &holes.items[i];
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)hole->offset, (off_t)hole->length) != 0) {
      die("fallocate");
    }
  }
  if (with_fsync) sync_file(fd);
  if (find_holes(fd).count != 0) {
    fprintf(stderr, "holes are left\n");
    return 1;
  }
  close(fd);
  report(begin, holes.count);
  return 0;
}
