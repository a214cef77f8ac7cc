#pragma once

#include <cstdio>
#include <vector>

namespace thicken_test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back(Test{name, run}); }
};

inline void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
  failures()++;
}

}  // namespace thicken_test

#define TEST(name)                                                            \
  static void name();                                                         \
  static const thicken_test::Registration registrationOf_##name(#name, name); \
  static void name()

#define CHECK(condition) thicken_test::check((condition), #condition, __FILE__, __LINE__)
