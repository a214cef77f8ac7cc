#include "file.h"

#include <fcntl.h>
#include <linux/btrfs.h>
#include <linux/btrfs_tree.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace thicken {
namespace {

// statx(2)'s answer as the kernel lays it out. The C library's struct knows these two fields only
// since glibc 2.37, and prebuilt addons must run with older ones.
constexpr unsigned kStatxDioAlign = 0x2000;
constexpr size_t kStatxSize = 256;
constexpr size_t kStatxMask = 0;
constexpr size_t kStatxDioMemAlign = 0x98;
constexpr size_t kStatxDioOffsetAlign = 0x9c;

uint32_t fieldAt(const unsigned char* statx, size_t offset) {
  uint32_t value;
  std::memcpy(&value, statx + offset, sizeof value);
  return value;
}

void readDirectAlignment(int fd, FileFacts* facts) {
  alignas(8) unsigned char answer[kStatxSize] = {};
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioAlign, answer) < 0) return;
  if ((fieldAt(answer, kStatxMask) & kStatxDioAlign) == 0) return;
  facts->directMemory = fieldAt(answer, kStatxDioMemAlign);
  facts->directOffset = fieldAt(answer, kStatxDioOffsetAlign);
}

// A stacked file system (overlayfs, Linux 6.18) has no block size of its own, and FIGETBSZ is
// EINVAL there; stat(2) tells that of the file below.
Status readBlockSize(int fd, uint32_t* size) {
  int block = 0;
  if (ioctl(fd, FIGETBSZ, &block) == 0 && block > 0) {
    *size = static_cast<uint32_t>(block);
    return {};
  }
  struct stat facts {};
  if (fstat(fd, &facts) < 0) return Status::failed("fstat");
  if (facts.st_blksize <= 0) return Status{EINVAL, "ioctl(FIGETBSZ)"};
  *size = static_cast<uint32_t>(facts.st_blksize);
  return {};
}

struct QgroupUse {
  uint64_t referenced = 0, exclusive = 0;
  uint64_t maxReferenced = 0, maxExclusive = 0;
  uint64_t limits = 0;
};

// Items of one type with the given objectid in the quota tree (BTRFS_IOC_TREE_SEARCH).
template <typename Visit>
bool searchQuotaTree(int fd, uint64_t objectid, uint32_t type, uint64_t minOffset,
                     uint64_t maxOffset, Visit visit) {
  btrfs_ioctl_search_args args{};
  args.key.tree_id = BTRFS_QUOTA_TREE_OBJECTID;
  args.key.min_objectid = args.key.max_objectid = objectid;
  args.key.min_type = args.key.max_type = type;
  args.key.min_offset = minOffset;
  args.key.max_offset = maxOffset;
  args.key.max_transid = std::numeric_limits<uint64_t>::max();
  args.key.nr_items = 64;
  if (ioctl(fd, BTRFS_IOC_TREE_SEARCH, &args) < 0) return false;
  size_t at = 0;
  for (uint32_t i = 0; i < args.key.nr_items; i++) {
    btrfs_ioctl_search_header header;
    if (at + sizeof header > sizeof args.buf) return false;
    std::memcpy(&header, args.buf + at, sizeof header);
    at += sizeof header;
    if (header.len > sizeof args.buf - at) return false;
    visit(header, args.buf + at);
    at += header.len;
  }
  return true;
}

bool readQgroup(int fd, uint64_t id, QgroupUse* use) {
  bool ok = searchQuotaTree(fd, 0, BTRFS_QGROUP_INFO_KEY, id, id,
                            [use](const btrfs_ioctl_search_header& header, const char* item) {
                              btrfs_qgroup_info_item info;
                              if (header.len < sizeof info) return;
                              std::memcpy(&info, item, sizeof info);
                              use->referenced = le64toh(info.rfer);
                              use->exclusive = le64toh(info.excl);
                            });
  return ok && searchQuotaTree(fd, 0, BTRFS_QGROUP_LIMIT_KEY, id, id,
                               [use](const btrfs_ioctl_search_header& header, const char* item) {
                                 btrfs_qgroup_limit_item limit;
                                 if (header.len < sizeof limit) return;
                                 std::memcpy(&limit, item, sizeof limit);
                                 use->limits = le64toh(limit.flags);
                                 use->maxReferenced = le64toh(limit.max_rfer);
                                 use->maxExclusive = le64toh(limit.max_excl);
                               });
}

void applyLimit(uint64_t limit, uint64_t used, QuotaFacts* facts) {
  const uint64_t left = limit > used ? limit - used : 0;
  facts->available = facts->limited ? std::min(facts->available, left) : left;
  facts->limited = true;
}

}  // namespace

Status readFileFacts(int fd, FileFacts* facts) {
  Status status = readBlockSize(fd, &facts->blockSize);
  if (!status.ok()) return status;
  unsigned long flags = 0;
  facts->hasInodeFlags = ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0;
  facts->inodeFlags = static_cast<uint32_t>(flags);
  readDirectAlignment(fd, facts);
  return {};
}

Status syncFile(int fd, SyncScope scope) {
  switch (scope) {
    case SyncScope::file:
      return fsync(fd) < 0 ? Status::failed("fsync") : Status{};
    case SyncScope::data:
      return fdatasync(fd) < 0 ? Status::failed("fdatasync") : Status{};
    case SyncScope::filesystem:
      return syncfs(fd) < 0 ? Status::failed("syncfs") : Status{};
  }
  return Status{EINVAL, "syncFile"};
}

Status readBtrfsQuota(int fd, QuotaFacts* facts) {
  btrfs_ioctl_ino_lookup_args lookup{};
  lookup.objectid = BTRFS_FIRST_FREE_OBJECTID;
  if (ioctl(fd, BTRFS_IOC_INO_LOOKUP, &lookup) < 0) return {};
  std::vector<uint64_t> groups{lookup.treeid};
  constexpr size_t kMostGroups = 64;
  for (size_t i = 0; i < groups.size(); i++) {
    QgroupUse use;
    if (!readQgroup(fd, groups[i], &use)) return {};
    if (use.limits & BTRFS_QGROUP_LIMIT_MAX_RFER)
      applyLimit(use.maxReferenced, use.referenced, facts);
    if (use.limits & BTRFS_QGROUP_LIMIT_MAX_EXCL)
      applyLimit(use.maxExclusive, use.exclusive, facts);
    // A relation is stored both ways; parents have the higher level, in the id's upper 16 bits.
    searchQuotaTree(fd, groups[i], BTRFS_QGROUP_RELATION_KEY, 0,
                    std::numeric_limits<uint64_t>::max(),
                    [&](const btrfs_ioctl_search_header& header, const char*) {
                      if (header.offset > groups[i] && groups.size() < kMostGroups)
                        groups.push_back(header.offset);
                    });
  }
  return {};
}

}  // namespace thicken
