#include "notices.h"

#include <fcntl.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <unistd.h>

#ifndef FAN_REPORT_FID
#define FAN_REPORT_FID 0x00000200
#endif

namespace thicken {

OpenNotices::OpenNotices() {
  fanotify_ = fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK | FAN_REPORT_FID, 0);
}

OpenNotices::~OpenNotices() {
  if (fanotify_ >= 0) close(fanotify_);
  if (inotify_ >= 0) close(inotify_);
}

Status OpenNotices::watch(const char* path) {
  if (fanotify_ >= 0 && fanotify_mark(fanotify_, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, path) == 0)
    return {};
  if (inotify_ < 0) inotify_ = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  if (inotify_ < 0) return Status::failed("inotify_init");
  if (inotify_add_watch(inotify_, path, IN_OPEN) < 0) return Status::failed("inotify_add_watch");
  return {};
}

OpenNotices::Opens OpenNotices::take() {
  Opens opens;
  if (fanotify_ >= 0) readFanotify(&opens);
  if (inotify_ >= 0) readInotify(&opens);
  return opens;
}

void OpenNotices::readFanotify(Opens* opens) {
  alignas(fanotify_event_metadata) char buffer[4096];
  for (;;) {
    ssize_t left = read(fanotify_, buffer, sizeof buffer);
    if (left <= 0) return;
    const auto* event = reinterpret_cast<const fanotify_event_metadata*>(buffer);
    for (; FAN_EVENT_OK(event, left); event = FAN_EVENT_NEXT(event, left)) {
      // The process is 0 where it is another one; so it is of an overflow.
      (event->pid == getpid() ? opens->own : opens->foreign)++;
    }
  }
}

void OpenNotices::readInotify(Opens* opens) {
  alignas(inotify_event) char buffer[4096];
  for (;;) {
    const ssize_t length = read(inotify_, buffer, sizeof buffer);
    if (length <= 0) return;
    for (ssize_t at = 0; at + static_cast<ssize_t>(sizeof(inotify_event)) <= length;) {
      const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
      if ((event->mask & (IN_OPEN | IN_Q_OVERFLOW)) != 0) opens->unknown++;
      at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
    }
  }
}

}  // namespace thicken
