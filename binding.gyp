{
  "targets": [
    {
      "target_name": "thicken",
      "sources": [
        "native/addon.cc",
        "native/allocate.cc",
        "native/bind/allocate.cc",
        "native/bind/args.cc",
        "native/bind/device.cc",
        "native/bind/extents.cc",
        "native/bind/file.cc",
        "native/bind/lock.cc",
        "native/bind/peer.cc",
        "native/bind/qcow2.cc",
        "native/bind/qcow2_allocate.cc",
        "native/device.cc",
        "native/extents.cc",
        "native/file.cc",
        "native/gate.cc",
        "native/io.cc",
        "native/lock.cc",
        "native/peer.cc",
        "native/pool.cc",
        "native/qcow2/allocate.cc",
        "native/qcow2/bitmaps.cc",
        "native/qcow2/chunk.cc",
        "native/qcow2/commit.cc",
        "native/qcow2/copies.cc",
        "native/qcow2/demand.cc",
        "native/qcow2/entry.cc",
        "native/qcow2/extensions.cc",
        "native/qcow2/header.cc",
        "native/qcow2/host.cc",
        "native/qcow2/image.cc",
        "native/qcow2/io.cc",
        "native/qcow2/layout.cc",
        "native/qcow2/map.cc",
        "native/qcow2/outcome.cc",
        "native/qcow2/own_blocks.cc",
        "native/qcow2/preallocated.cc",
        "native/qcow2/refcounts.cc",
        "native/qcow2/references.cc",
        "native/qcow2/snapshots.cc",
        "native/qcow2/space.cc",
        "native/qcow2/survey.cc",
        "native/qcow2/tables.cc",
        "native/zero.cc"
      ],
      "dependencies": ["<!(node -p \"require('node-addon-api').targets\"):node_addon_api_except"],
      "defines": [
        "NAPI_VERSION=9",
        "NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS",
        "_FILE_OFFSET_BITS=64"
      ],
      "cflags_cc": ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
    }
  ]
}
