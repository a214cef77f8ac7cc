#pragma once

#include <endian.h>

#include <cstdint>
#include <cstring>

namespace thicken::qcow2 {

inline uint16_t load16(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof value);
  return be16toh(value);
}

inline uint32_t load32(const uint8_t* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof value);
  return be32toh(value);
}

inline uint64_t load64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return be64toh(value);
}

inline void store32(uint8_t* at, uint32_t value) {
  value = htobe32(value);
  std::memcpy(at, &value, sizeof value);
}

inline void store64(uint8_t* at, uint64_t value) {
  value = htobe64(value);
  std::memcpy(at, &value, sizeof value);
}

}  // namespace thicken::qcow2
