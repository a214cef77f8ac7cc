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

/// A file with a gate, and the descriptors that are opened through it.
struct Gated {
  TemporaryFile file;
  OpenGate gate;
  CancelFlag cancel;
  std::vector<int> opened;

  Gated() { CHECK(gate.watch(file.fd()).ok()); }
  ~Gated() {
    for (int fd : opened) close(fd);
  }
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
  for (size_t most : {1, 2, 5}) {
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

TEST(gateSeesAForeignOpenBeforeOneOfItsOwn) {
  for (size_t before : {0, 1, 2}) {
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
  thicken_test::require(fcntl(leased, F_SETSIG, SIGURG) == 0, "fcntl(F_SETSIG)");
  thicken_test::require(fcntl(leased, F_SETLEASE, F_RDLCK) == 0, "fcntl(F_SETLEASE)");
  int fd = -1;
  std::thread letGo([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    thicken_test::require(fcntl(leased, F_SETLEASE, F_UNLCK) == 0, "fcntl(F_SETLEASE)");
  });
  CHECK(gated.gate.open(leased, O_RDWR, gated.cancel, &fd).ok());
  letGo.join();
  close(fd);
  thicken_test::require(fcntl(leased, F_SETLEASE, F_RDLCK) == 0, "fcntl(F_SETLEASE)");
  gated.cancel.set();
  CHECK(gated.gate.open(leased, O_RDWR, gated.cancel, &fd).error == ECANCELED);
  CHECK(fd == -1);
  close(leased);
}

TEST(gateFailsToWatchABadDescriptor) {
  OpenGate gate;
  CHECK(!gate.watch(-1).ok());
}
