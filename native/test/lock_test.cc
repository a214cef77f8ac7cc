#include "../lock.h"

#include "check.h"
#include "temporary_file.h"

using thicken::probeLocks;
using thicken::probeWriter;
using thicken::releaseLocks;
using thicken::Status;
using thicken::takeLocks;
using thicken_test::TemporaryFile;

namespace {

using Bytes = std::vector<uint64_t>;

Bytes heldAgainst(int fd, const Bytes& bytes) {
  Bytes held;
  CHECK(probeLocks(fd, bytes, &held).ok());
  return held;
}

void lockExclusively(int fd, uint64_t byte) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(byte);
  lock.l_len = 1;
  thicken_test::require(fcntl(fd, F_OFD_SETLK, &lock) == 0, "fcntl(F_OFD_SETLK)");
}

}  // namespace

TEST(locksShowOnOtherDescriptorsOnly) {
  TemporaryFile file;
  const int other = file.open(O_RDWR);
  CHECK(takeLocks(other, {100, 101, 203}).ok());
  CHECK((heldAgainst(file.fd(), {100, 101, 102, 201, 203}) == Bytes{100, 101, 203}));
  CHECK(heldAgainst(other, {100, 101, 203}).empty());
  CHECK(releaseLocks(other, {101}).ok());
  CHECK((heldAgainst(file.fd(), {100, 101, 203}) == Bytes{100, 203}));
  close(other);
  CHECK(heldAgainst(file.fd(), {100, 101, 203}).empty());
}

TEST(locksAreSharedWithOtherHolders) {
  TemporaryFile file;
  const int first = file.open(O_RDWR);
  const int second = file.open(O_RDWR);
  CHECK(takeLocks(first, {100, 201}).ok());
  CHECK(takeLocks(second, {100, 201}).ok());
  CHECK((heldAgainst(first, {100, 201}) == Bytes{100, 201}));
  close(first);
  close(second);
}

TEST(locksAreTakenAllOrNone) {
  TemporaryFile file;
  const int other = file.open(O_RDWR);
  lockExclusively(other, 201);
  const Status status = takeLocks(file.fd(), {100, 101, 201, 203});
  CHECK(status.error == EAGAIN && status.offset == 201 && status.length == 1);
  CHECK(heldAgainst(other, {100, 101, 201, 203}).empty());
  CHECK((heldAgainst(file.fd(), {201}) == Bytes{201}));
  close(other);
}

TEST(writerIsSeen) {
  TemporaryFile file;
  const int reader = file.open(O_RDONLY);
  bool writer = false;
  // The object's own descriptor is one.
  CHECK(probeWriter(reader, &writer).ok());
  CHECK(writer);
  close(reader);
}

TEST(noWriterIsSeenWhereThereIsNone) {
  TemporaryFile file;
  const int reader = file.open(O_RDONLY);
  const int secondReader = file.open(O_RDONLY);
  file.closeWriter();
  bool writer = true;
  CHECK(probeWriter(reader, &writer).ok());
  CHECK(!writer);
  // The lease was given back: a writer gets in at once, and is seen.
  const int opened = file.open(O_RDWR | O_NONBLOCK);
  CHECK(probeWriter(reader, &writer).ok());
  CHECK(writer);
  close(opened);
  CHECK(probeWriter(reader, &writer).ok());
  CHECK(!writer);
  for (int fd : {reader, secondReader}) close(fd);
}

TEST(writerProbeFailsOnABadDescriptor) {
  bool writer = false;
  CHECK(probeWriter(-1, &writer).error == EBADF);
}
