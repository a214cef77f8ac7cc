#include "gate.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <string>
#include <system_error>

#include "signals.h"

namespace thicken {
namespace {

std::string linkTo(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

void closeIfOpen(int fd) {
  if (fd >= 0) close(fd);
}

}  // namespace

OpenGate::OpenGate() {
  fanotify_ = fanotify_init(FAN_CLASS_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK,
                            O_RDONLY | O_CLOEXEC | O_LARGEFILE | O_NONBLOCK);
  if (fanotify_ >= 0) startWatcher();
  if (fanotify_ < 0) inotify_ = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
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
  // Closing lets go whoever still waits.
  closeIfOpen(fanotify_);
  closeIfOpen(inotify_);
  closeIfOpen(stop_);
}

Status OpenGate::watch(int fd) {
  const std::string path = linkTo(fd);
  if (fanotify_ >= 0) {
    if (fanotify_mark(fanotify_, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, path.c_str()) == 0)
      return {};
    return Status::failed("fanotify_mark");
  }
  if (inotify_ >= 0 && inotify_add_watch(inotify_, path.c_str(), IN_OPEN) < 0)
    return Status::failed("inotify_add_watch");
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
  own_ = foreign_ = 0;
}

bool OpenGate::settle(uint64_t own) {
  std::lock_guard<std::mutex> guard(mutex_);
  readNotices();
  if (foreign_ > 0 || own_ != own) return false;
  own_ = 0;
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

// Without permission events nobody knows who opened: all count as our own, and a foreign one makes
// the number wrong.
void OpenGate::readNotices() {
  if (inotify_ < 0) return;
  alignas(inotify_event) char buffer[4096];
  for (;;) {
    const ssize_t length = read(inotify_, buffer, sizeof buffer);
    if (length <= 0) return;
    for (ssize_t at = 0; at + static_cast<ssize_t>(sizeof(inotify_event)) <= length;) {
      const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
      if ((event->mask & (IN_OPEN | IN_Q_OVERFLOW)) != 0) own_++;
      at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
    }
  }
}

}  // namespace thicken
