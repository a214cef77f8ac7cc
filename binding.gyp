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
        "native/device.cc",
        "native/extents.cc",
        "native/file.cc",
        "native/gate.cc",
        "native/io.cc",
        "native/lock.cc",
        "native/peer.cc",
        "native/pool.cc",
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
