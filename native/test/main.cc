#include <cstdio>
#include <string>

#include "check.h"
#include "temporary_file.h"

// Arguments: the folder, and so the file system, to test on; and how the names of the tests begin,
// where not all are meant. Other output than of failures is for the caller to check: which tests
// ran, and what the file system can't do.
int main(int argc, char** argv) {
  if (argc != 2 && argc != 3) {
    std::fprintf(stderr, "usage: %s FOLDER [BEGINNING]\n", argv[0]);
    return 2;
  }
  thicken_test::TemporaryFile::folder() = argv[1];
  const std::string beginning = argc == 3 ? argv[2] : "";
  size_t ran = 0;
  int failed = 0;
  for (const thicken_test::Test& test : thicken_test::tests()) {
    if (std::string(test.name).rfind(beginning, 0) != 0) continue;
    ran++;
    const int before = thicken_test::failures();
    test.run();
    const bool ok = thicken_test::failures() == before;
    if (!ok) failed++;
    std::printf("%s %s\n", ok ? "ok" : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed\n", ran, failed);
  return failed == 0 ? 0 : 1;
}
