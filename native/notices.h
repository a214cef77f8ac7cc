#pragma once

#include <cstdint>

#include "status.h"

namespace thicken {

/// Opens of inodes, told after the fact: all that may be had without CAP_SYS_ADMIN.
///
/// fanotify(7) tells of an open with its process, as far as whether that is this one (Linux 5.13),
/// and never makes one event of two processes'. Where that is not to be had (an old kernel, a file
/// system without file handles, a container that forbids it), inotify(7) is left: it does not tell
/// who it was, and an open is merged with the one before if that was not read yet.
class OpenNotices {
 public:
  OpenNotices();
  ~OpenNotices();
  OpenNotices(const OpenNotices&) = delete;
  OpenNotices& operator=(const OpenNotices&) = delete;

  /// Watches one more inode.
  Status watch(const char* path);

  struct Opens {
    uint64_t own = 0;
    uint64_t foreign = 0;
    uint64_t unknown = 0;
  };
  /// Those since the last call; at least one of each kind that there was.
  Opens take();

  /// Whether own opens are told from foreign ones, on all that is watched.
  bool knowOpeners() const { return inotify_ < 0; }

 private:
  void readFanotify(Opens* opens);
  void readInotify(Opens* opens);

  int fanotify_ = -1;
  int inotify_ = -1;
};

}  // namespace thicken
