#include "gate.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <system_error>

#include "signals.h"

namespace thicken {
namespace {

/// Between two attempts to open what has a foreign lease on it.
constexpr std::chrono::milliseconds kLeaseWait{10};
/// An own open takes some 10 µs; one whose thread was put aside meanwhile may hide a foreign one.
constexpr std::chrono::microseconds kBriefly{100};
/// In a row: then it is the storage that takes long.
constexpr unsigned kMostSlow = 8;

std::string linkTo(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

void closeIfOpen(int fd) {
  if (fd >= 0) close(fd);
}

}  // namespace

OpenGate::OpenGate() {
  fanotify_ = fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK,
                            O_RDONLY | O_CLOEXEC | O_LARGEFILE | O_NONBLOCK);
  if (fanotify_ >= 0) startWatcher();
  if (fanotify_ < 0) notices_ = std::make_unique<OpenNotices>();
}

void OpenGate::startWatcher() {
  stop_ = eventfd(0, EFD_CLOEXEC);
  try {
    const SignalsBlocked blocked;
    if (stop_ >= 0) watcher_ = std::thread([this] { watchOpens(); });
  } catch (const std::system_error&) {
    // Nobody could answer the events.
  }
  if (watcher_.joinable()) return;
  closeIfOpen(fanotify_);
  fanotify_ = -1;
}

OpenGate::~OpenGate() {
  if (watcher_.joinable()) {
    const uint64_t one = 1;
    // An eventfd takes a small number whenever it is asked to.
    (void)!write(stop_, &one, sizeof one);
    watcher_.join();
  }
  for (int fd : opened_) close(fd);
  // Closing lets go whoever still waits.
  closeIfOpen(fanotify_);
  closeIfOpen(stop_);
}

Status OpenGate::watch(int fd) {
  const std::string path = linkTo(fd);
  if (notices_) return notices_->watch(path.c_str());
  if (fanotify_mark(fanotify_, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, path.c_str()) < 0)
    return Status::failed("fanotify_mark");
  return {};
}

bool OpenGate::enter() {
  std::lock_guard<std::mutex> guard(mutex_);
  readNotices();
  if (own_ + foreign_ > 0) return false;
  inside_++;
  return true;
}

void OpenGate::leave() {
  std::lock_guard<std::mutex> guard(mutex_);
  if (--inside_ == 0) drained_.notify_all();
}

void OpenGate::reset() {
  std::lock_guard<std::mutex> guard(mutex_);
  readNotices();
  own_ = expected_ = foreign_ = 0;
}

// Without O_NONBLOCK, the pool's thread would wait for the end of a lease however long that takes,
// and the end of the environment for the thread.
Status OpenGate::open(int fd, int flags, const CancelFlag& cancel, int* opened) {
  const std::string path = linkTo(fd);
  for (;;) {
    const Status status = openOnce(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, opened);
    if (status.ok()) break;
    if (status.error != EWOULDBLOCK) return status;
    if (cancel.isSet()) return Status{ECANCELED, "open"};
    std::this_thread::sleep_for(kLeaseWait);
  }
  fcntl(*opened, F_SETFL, flags);
  std::lock_guard<std::mutex> guard(mutex_);
  opened_.insert(*opened);
  return {};
}

Status OpenGate::closeOpened(int fd) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    if (opened_.erase(fd) == 0) return Status{EBADF, "close"};
  }
  return close(fd) < 0 ? Status::failed("close") : Status{};
}

// The mutex is not held meanwhile: the watcher needs it, to let the open through.
Status OpenGate::openOnce(const char* path, int flags, int* opened) {
  const auto begin = std::chrono::steady_clock::now();
  {
    std::lock_guard<std::mutex> guard(mutex_);
    readNotices();
  }
  *opened = ::open(path, flags);
  const Status status = *opened < 0 ? Status::failed("open") : Status{};
  countOwn(status.ok() ? 1 : 0, begin);
  return status;
}

void OpenGate::countOwn(uint64_t opens, std::chrono::steady_clock::time_point begin) {
  std::lock_guard<std::mutex> guard(mutex_);
  expected_ += opens;
  // A permission event has been counted by the watcher before the open was let through.
  if (!notices_) return;
  const OpenNotices::Opens seen = notices_->take();
  own_ += opens;
  foreign_ += seen.foreign + (seen.unknown > opens ? seen.unknown - opens : 0);
  if (!notices_->knowOpeners() && mayHideOne(begin)) foreign_++;
}

// Seen with inotify alone on a busy machine: twice in 200 runs the open of a writer that came while
// the thread waited for its processor was merged with the own one, and the run went on beside it.
bool OpenGate::mayHideOne(std::chrono::steady_clock::time_point begin) {
  if (std::chrono::steady_clock::now() - begin <= kBriefly) {
    slowOpens_ = 0;
    return false;
  }
  if (slowOpens_ == kMostSlow) return false;
  slowOpens_++;
  return true;
}

bool OpenGate::settle() {
  std::lock_guard<std::mutex> guard(mutex_);
  readNotices();
  if (foreign_ > 0 || own_ != expected_) return false;
  own_ = expected_ = 0;
  return true;
}

bool OpenGate::disturbed() {
  std::lock_guard<std::mutex> guard(mutex_);
  readNotices();
  return own_ + foreign_ > 0;
}

void OpenGate::watchOpens() {
  for (;;) {
    pollfd waiting[2] = {{fanotify_, POLLIN, 0}, {stop_, POLLIN, 0}};
    if (poll(waiting, 2, -1) < 0 && errno != EINTR) return;
    if (waiting[1].revents != 0) return;
    if (waiting[0].revents != 0) readPermissionEvents();
  }
}

void OpenGate::readPermissionEvents() {
  alignas(fanotify_event_metadata) char buffer[4096];
  const ssize_t length = read(fanotify_, buffer, sizeof buffer);
  if (length <= 0) return;
  const auto* event = reinterpret_cast<const fanotify_event_metadata*>(buffer);
  ssize_t left = length;
  while (FAN_EVENT_OK(event, left)) {
    if ((event->mask & FAN_OPEN_PERM) != 0 && event->fd >= 0)
      admit(event->fd, event->pid == getpid());
    event = FAN_EVENT_NEXT(event, left);
  }
}

// The opener has its write access counted before it comes here (do_dentry_open, Linux 6.18): a
// lease that is probed later sees it.
void OpenGate::admit(int eventFd, bool own) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    (own ? own_ : foreign_)++;
    drained_.wait(lock, [this] { return inside_ == 0; });
  }
  fanotify_response response{};
  response.fd = eventFd;
  response.response = FAN_ALLOW;
  (void)!write(fanotify_, &response, sizeof response);
  close(eventFd);
}

// What is not told within open() is a disturbance, also when another part of this process did it.
void OpenGate::readNotices() {
  if (!notices_) return;
  const OpenNotices::Opens seen = notices_->take();
  foreign_ += seen.own + seen.foreign + seen.unknown;
}

}  // namespace thicken
