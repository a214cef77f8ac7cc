/* Makes a file of EXTENTS times data followed by a hole, synced. */
#include "common.h"

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s FILE EXTENTS DATA_BYTES HOLE_BYTES\n", argv[0]);
    return 2;
  }
  uint64_t extents = strtoull(argv[2], NULL, 10);
  uint64_t data = strtoull(argv[3], NULL, 10), hole = strtoull(argv[4], NULL, 10);
  int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) die(argv[1]);
  /* The length first: xfs allocates past what is written when a write extends the file. */
  if (ftruncate(fd, (off_t)(extents * (data + hole))) != 0) die("ftruncate");
  uint64_t* content = allocate_or_die(data + sizeof(uint64_t));
  for (uint64_t i = 0; i <= data / sizeof(uint64_t); i++) content[i] = (i + 1) * 0x9e3779b97f4a7c15U;
  for (uint64_t i = 0; i < extents; i++) {
    content[0] = i + 1;
    if (pwrite(fd, content, data, (off_t)(i * (data + hole))) != (ssize_t)data) die("pwrite");
  }
  sync_file(fd);
  close(fd);
  return 0;
}
