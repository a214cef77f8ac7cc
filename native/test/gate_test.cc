#include "../gate.h"

#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <thread>

#include "check.h"
#include "temporary_file.h"

using thicken::CancelFlag;
using thicken::OpenGate;
using thicken_test::TemporaryFile;

namespace {

/// Opens and closes it in another process.
void openElsewhere(const TemporaryFile& file, int flags = O_RDWR) {
  const pid_t child = fork();
  thicken_test::require(child >= 0, "fork");
  if (child == 0) {
    file.open(flags);
    _exit(0);
  }
  waitpid(child, nullptr, 0);
}

/// Whoever breaks it sends a signal: one that is ignored. Giving it back forgets which.
void lease(int fd, int type) {
  thicken_test::require(fcntl(fd, F_SETSIG, SIGURG) == 0, "fcntl(F_SETSIG)");
  thicken_test::require(fcntl(fd, F_SETLEASE, type) == 0, "fcntl(F_SETLEASE)");
}

/// A file with a gate, and the descriptors that are opened through it.
struct Gated {
  TemporaryFile file;
  OpenGate gate;
  CancelFlag cancel;
  /// The gate closes them.
  std::vector<int> opened;

  Gated() { CHECK(gate.watch(file.fd()).ok()); }
  Gated(const Gated&) = delete;
  Gated& operator=(const Gated&) = delete;

  thicken::Status open(int flags = O_RDWR) {
    int fd = -1;
    const thicken::Status status = gate.open(file.fd(), flags, cancel, &fd);
    CHECK(status.ok() == (fd >= 0));
    if (fd >= 0) opened.push_back(fd);
    return status;
  }

  bool enters() {
    const bool granted = gate.enter();
    if (granted) gate.leave();
    return granted;
  }
};

}  // namespace

TEST(gateSaysHowItLearnsOfOpens) {
  Gated gated;
  const char* knowing = gated.gate.knowsOpeners() ? "notification" : "inotify";
  std::printf("gate by %s\n", gated.gate.holdsOpens() ? "permission" : knowing);
}

TEST(gateAllowsForEachOpenOfItsOwn) {
  Gated gated;
  for (size_t most : {1u, 2u, 5u}) {
    gated.gate.reset();
    while (gated.opened.size() < most) CHECK(gated.open().ok());
    CHECK(gated.gate.settle());
    CHECK(!gated.gate.disturbed());
    CHECK(gated.enters());
  }
}

TEST(gateOpensWithTheFlagsThatWereAskedFor) {
  Gated gated;
  for (int flags : {O_RDONLY, O_RDWR, O_RDWR | O_APPEND}) {
    CHECK(gated.open(flags).ok());
    const int fd = gated.opened.back();
    CHECK((fcntl(fd, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == flags);
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
  }
}

TEST(gateClosesWhatItOpenedWhenItIsToldToOrAtItsEnd) {
  int closed = -1;
  int left = -1;
  {
    Gated gated;
    CHECK(gated.open().ok() && gated.open().ok());
    closed = gated.opened[0];
    left = gated.opened[1];
    CHECK(gated.gate.closeOpened(closed).ok());
    CHECK(fcntl(closed, F_GETFD) < 0);
    CHECK(gated.gate.closeOpened(closed).error == EBADF);
    CHECK(gated.gate.closeOpened(gated.file.fd()).error == EBADF);
    CHECK(fcntl(left, F_GETFD) >= 0);
  }
  CHECK(fcntl(left, F_GETFD) < 0);
}

TEST(gateSeesAForeignOpenBeforeOneOfItsOwn) {
  for (size_t before : {0u, 1u, 2u}) {
    Gated gated;
    gated.gate.reset();
    for (size_t i = 0; i < 3; i++) {
      if (i == before) openElsewhere(gated.file);
      CHECK(gated.open().ok());
    }
    CHECK(!gated.gate.settle());
    CHECK(!gated.enters());
  }
}

TEST(gateSeesAForeignOpenAfterTheLastOneOfItsOwn) {
  Gated gated;
  gated.gate.reset();
  CHECK(gated.open().ok());
  openElsewhere(gated.file, O_RDONLY);
  CHECK(!gated.gate.settle());
  // Nobody since.
  gated.gate.reset();
  CHECK(gated.open().ok());
  CHECK(gated.gate.settle());
  openElsewhere(gated.file);
  CHECK(gated.gate.disturbed());
  CHECK(!gated.enters());
}

TEST(gateSeesOpensOfThisProcessThatAreNotItsOwn) {
  Gated gated;
  gated.gate.reset();
  CHECK(gated.open().ok());
  close(gated.file.open(O_RDWR));
  CHECK(!gated.gate.settle());
}

TEST(gateSettlesAgainAfterAnOpenThatWasRefused) {
  Gated gated;
  gated.gate.reset();
  CHECK(gated.open(O_RDWR | O_DIRECTORY).error == ENOTDIR);
  gated.gate.reset();
  CHECK(gated.open().ok());
  CHECK(gated.gate.settle());
}

TEST(gateWaitsForAForeignLeaseUntilItIsCancelled) {
  Gated gated;
  const int leased = gated.file.open(O_RDONLY);
  gated.file.closeWriter();
  lease(leased, F_RDLCK);
  int fd = -1;
  std::thread letGo([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    lease(leased, F_UNLCK);
  });
  CHECK(gated.gate.open(leased, O_RDWR, gated.cancel, &fd).ok());
  letGo.join();
  CHECK(gated.gate.closeOpened(fd).ok());
  lease(leased, F_RDLCK);
  gated.cancel.set();
  CHECK(gated.gate.open(leased, O_RDWR, gated.cancel, &fd).error == ECANCELED);
  CHECK(fd == -1);
  close(leased);
}

TEST(gateFailsToWatchABadDescriptor) {
  OpenGate gate;
  CHECK(!gate.watch(-1).ok());
}
