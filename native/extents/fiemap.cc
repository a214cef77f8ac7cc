#include "fiemap_buffer.h"
#include "readers.h"

namespace thicken {

Status readFiemap(Reading* reading) {
  FiemapBuffer& buffer = FiemapBuffer::ofThread();
  while (reading->goesOn()) {
    const Range rest = reading->rest();
    Status status = buffer.read(reading->fd, kFiemap, rest, reading->room(2));
    if (!status.ok()) return status;
    bool last = buffer.count() == 0;
    for (uint32_t i = 0; i < buffer.count() && reading->hasRoom(); i++) {
      const fiemap_extent& extent = buffer.extents()[i];
      reading->addExtent(extent.fe_logical, extent.fe_length, extent.fe_flags);
      if (extent.fe_flags & FIEMAP_EXTENT_LAST) last = true;
    }
    if (last && reading->hasRoom()) reading->addHole(reading->end);
    // Extents that lie wholly before what was asked for would be given again, for ever.
    if (reading->at == rest.offset) return Status{EIO, kFiemap.name, rest.offset, rest.length};
  }
  return {};
}

}  // namespace thicken
