#include <cstdio>

#include "check.h"
#include "temporary_file.h"

// One argument: the folder, and so the file system, to test on. Other output than of failures is
// for the caller to check: which tests ran, and what the file system can't do.
int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  thicken_test::TemporaryFile::folder() = argv[1];
  int failed = 0;
  for (const thicken_test::Test& test : thicken_test::tests()) {
    const int before = thicken_test::failures();
    test.run();
    const bool ok = thicken_test::failures() == before;
    if (!ok) failed++;
    std::printf("%s %s\n", ok ? "ok" : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed\n", thicken_test::tests().size(), failed);
  return failed == 0 ? 0 : 1;
}
