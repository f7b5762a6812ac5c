# Finds nvcc and adds the CUDA half to _C, or says in one line why not.
#   CEG_CUDA        0: skip; 1: a missing nvcc is an error; unset: build it where nvcc is
#   CEG_CUDA_ARCHS  as CMAKE_CUDA_ARCHITECTURES; default: the GPU present, else see below
set(CUDA_STATUS "")
set(CUDA_ARCHS_TEXT "")

function(find_nvcc result)
  find_program(NVCC_ON_PATH nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
  file(GLOB toolkits /usr/local/cuda*/bin/nvcc)
  set(wheel ${CEG_SITE_PACKAGES}/nvidia/cu13/bin/nvcc)
  foreach(candidate "$ENV{CUDACXX}" "$ENV{CUDA_HOME}/bin/nvcc" "${NVCC_ON_PATH}" ${toolkits}
          ${wheel})
    if(candidate AND EXISTS "${candidate}")
      execute_process(COMMAND ${candidate} --version RESULT_VARIABLE status OUTPUT_QUIET
                      ERROR_QUIET)
      if(status EQUAL 0)
        set(${result} "${candidate}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

# `native` fails on a machine without a GPU, so it is asked for by hand.
function(default_archs result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities RESULT_VARIABLE status ERROR_QUIET
                  OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(archs "")
  if(status EQUAL 0)
    string(REPLACE "\n" ";" capabilities "${capabilities}")
    foreach(capability IN LISTS capabilities)
      string(REPLACE "." "" capability "${capability}")
      # wgmma and setmaxnreg exist in sm_90a only, not in sm_90.
      string(REGEX REPLACE "^90$" "90a" capability "${capability}")
      list(APPEND archs ${capability}-real)
    endforeach()
    list(REMOVE_DUPLICATES archs)
  endif()
  if(NOT archs)
    set(archs 80-real 90a-real 90-virtual)
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

if("$ENV{CEG_CUDA}" STREQUAL "0")
  set(CUDA_STATUS "skipped: CEG_CUDA=0 when it was built")
  set(NVCC "")
else()
  find_nvcc(NVCC)
  if(NOT NVCC)
    set(CUDA_STATUS
        "nvcc not found in $CUDACXX, $CUDA_HOME/bin, PATH, /usr/local/cuda*/bin, nvidia/cu13")
  endif()
endif()

if(NVCC)
  if(DEFINED ENV{CEG_CUDA_ARCHS})
    set(CMAKE_CUDA_ARCHITECTURES $ENV{CEG_CUDA_ARCHS})
  else()
    default_archs(CMAKE_CUDA_ARCHITECTURES)
  endif()
  set(CMAKE_CUDA_COMPILER ${NVCC})
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  add_library(cuda_kernels OBJECT ${CUDA_SOURCES})
  target_compile_options(cuda_kernels PRIVATE -std=c++20)
  target_compile_definitions(_C PRIVATE CEG_HAS_CUDA)
  # Static: the module also loads, and computes, where there is no CUDA runtime or driver.
  target_link_libraries(_C PRIVATE cuda_kernels CUDA::cudart_static)
  set_target_properties(_C PROPERTIES LINKER_LANGUAGE CXX)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " CUDA_ARCHS_TEXT)
  message(STATUS "ceg_kernels: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CUDA_ARCHS_TEXT}")
elseif("$ENV{CEG_CUDA}" STREQUAL "1")
  message(FATAL_ERROR "CEG_CUDA=1, but ${CUDA_STATUS}")
else()
  message(STATUS "ceg_kernels: CPU kernels only (CUDA ${CUDA_STATUS})")
endif()
