/* A scan by SEEK_DATA and SEEK_HOLE; counts data regions. */
#include "common.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  double begin = now();
  int fd = open_file(argv[1], O_RDONLY);
  uint64_t count = 0;
  off_t position = 0;
  while ((position = lseek(fd, position, SEEK_DATA)) >= 0) {
    position = lseek(fd, position, SEEK_HOLE);
    if (position < 0) die("SEEK_HOLE");
    count++;
  }
  if (errno != ENXIO) die("SEEK_DATA");
  close(fd);
  report(begin, count);
  return 0;
}
