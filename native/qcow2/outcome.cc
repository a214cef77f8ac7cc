#include "outcome.h"

namespace thicken::qcow2 {

const char* codeName(Code code) {
  switch (code) {
    case Code::ok:
      return "OK";
    case Code::io:
      return "IO";
    case Code::notQcow2:
      return "NOT_QCOW2";
    case Code::unsupported:
      return "UNSUPPORTED";
    case Code::unknownFeature:
      return "QCOW2_UNKNOWN_FEATURE";
    case Code::dirty:
      return "QCOW2_DIRTY";
    case Code::corruptBit:
    case Code::corrupt:
      return "QCOW2_CORRUPT";
    case Code::outsideFile:
      return "QCOW2_OUTSIDE_FILE";
    case Code::overlap:
      return "QCOW2_OVERLAP";
    case Code::absurd:
      return "QCOW2_ABSURD";
    case Code::needsPopulate:
      return "NEEDS_POPULATE";
    case Code::stale:
      return "STALE";
  }
  return "QCOW2_CORRUPT";
}

}  // namespace thicken::qcow2
