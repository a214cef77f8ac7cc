#pragma once

#include <cstdint>

#include "status.h"

namespace thicken {

struct FileFacts {
  uint32_t blockSize = 0;      ///< bytes (FIGETBSZ, or st_blksize): the unit of allocation
  bool hasInodeFlags = false;  ///< whether the file system has FS_IOC_GETFLAGS
  uint32_t inodeFlags = 0;     ///< FS_*_FL (linux/fs.h)
  uint32_t directMemory = 0;   ///< bytes (statx(2), STATX_DIOALIGN, Linux 6.1); 0: unknown
  uint32_t directOffset = 0;   ///< bytes; 0: unknown, or no direct I/O
};

Status readFileFacts(int fd, FileFacts* facts);

enum class SyncScope : uint8_t { file = 0, data = 1, filesystem = 2 };

/// fsync(2), fdatasync(2) or syncfs(2).
Status syncFile(int fd, SyncScope scope);

/// What the btrfs quota groups of the file's subvolume leave (bytes). Needs CAP_SYS_ADMIN; where
/// there is no limit, or no way to tell, `limited` is false.
struct QuotaFacts {
  bool limited = false;
  uint64_t available = 0;
};

Status readBtrfsQuota(int fd, QuotaFacts* facts);

}  // namespace thicken
