/* The least that a scan can cost: FIEMAP, nothing kept. */
#include "common.h"

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: %s FILE [EXTENTS_PER_CALL]\n", argv[0]);
    return 2;
  }
  unsigned long per_call = argc == 3 ? strtoul(argv[2], NULL, 10) : DEFAULT_EXTENTS_PER_CALL;
  if (per_call < 1 || per_call > 1 << 20) return 2;
  double begin = now();
  int fd = open_file(argv[1], O_RDONLY);
  uint64_t count = scan_fiemap(fd, (uint32_t)per_call, NULL, NULL);
  close(fd);
  report(begin, count);
  return 0;
}
