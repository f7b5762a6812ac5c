# KERNEL_HASHES, "family=hash ...": what the CUDA kernels of each family of ops are made of. Those
# are the files named after it, and all that are named after no family, which any may include.
set(FAMILIES attention moe rms_norm roofs rope)

file(GLOB sources CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}
     cmake/cuda.cmake csrc/*.h csrc/*.cpp csrc/cuda/*.h csrc/cuda/*.cu)
list(FILTER sources EXCLUDE REGEX "^csrc/(bindings|build_info)\\.")
# An edit configures anew, in builds that were not started by setup.py too.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})

set(KERNEL_HASHES "")
foreach(family IN LISTS FAMILIES)
  set(others ${FAMILIES})
  list(REMOVE_ITEM others ${family})
  list(JOIN others "|" others)
  set(mine ${sources})
  list(FILTER mine EXCLUDE REGEX "/(${others})[_.]")
  set(text "")
  foreach(path IN LISTS mine)
    file(SHA256 ${CMAKE_CURRENT_SOURCE_DIR}/${path} hash)
    string(APPEND text "${path} ${hash}\n")
  endforeach()
  string(SHA256 hash "${text}")
  string(SUBSTRING ${hash} 0 16 hash)
  string(APPEND KERNEL_HASHES "${family}=${hash} ")
endforeach()
