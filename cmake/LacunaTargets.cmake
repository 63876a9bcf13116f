# The modules in dependency order (a file includes its own and earlier ones only; tests/build checks it) and the functions
# that their folders call.
set(LACUNA_MODULES base device trace kv ops attention strategy pipeline metrics replay model tasks study report)

# Flags of this tree alone: not exported, not passed on to those who build against the package.
add_library(lacuna_flags INTERFACE)
target_compile_options(
  lacuna_flags
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # A false alarm of g++ 12 on `"text" + string` (GCC bug 105651).
  target_compile_options(
    lacuna_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wno-restrict>)
endif()
if(LACUNA_WERROR)
  target_compile_options(
    lacuna_flags
    INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
              $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>)
endif()
if(LACUNA_SANITIZE)
  string(REPLACE ";" "," sanitizers "${LACUNA_SANITIZE}")
  set(sanitize "-fsanitize=${sanitizers}" -fno-sanitize-recover=all)
  target_compile_options(lacuna_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${sanitize};-fno-omit-frame-pointer>)
  target_link_options(lacuna_flags INTERFACE ${sanitize})
endif()

# lacuna_module(<module> SOURCES a.cpp… [PORTABLE_SOURCES b.cpp…] [CUDA_SOURCES x.cu…]): adds a module's files to the
# library. Portable ones hold loops for host and device: nvcc compiles them in CUDA builds.
function(lacuna_module module)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;PORTABLE_SOURCES;CUDA_SOURCES")
  if(NOT module IN_LIST LACUNA_MODULES OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "lacuna_module(${ARGV}): expected one of ${LACUNA_MODULES}, then SOURCES, PORTABLE_SOURCES and "
                        "CUDA_SOURCES")
  endif()
  list(TRANSFORM arg_PORTABLE_SOURCES PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/")
  if(LACUNA_CUDA)
    list(APPEND arg_SOURCES ${arg_CUDA_SOURCES})
    set_source_files_properties(${arg_PORTABLE_SOURCES} TARGET_DIRECTORY lacuna PROPERTIES LANGUAGE CUDA)
  endif()
  list(TRANSFORM arg_SOURCES PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/")
  target_sources(lacuna PRIVATE ${arg_SOURCES} ${arg_PORTABLE_SOURCES})
endfunction()

# An executable of tests; `kind` is empty or _gpu.
function(_lacuna_test_executable module kind)
  set(target test_${module}${kind})
  add_executable(${target} ${ARGN} "${PROJECT_SOURCE_DIR}/tests/main.cpp")
  target_link_libraries(${target} PRIVATE lacuna::lacuna lacuna_flags doctest::doctest fmt::fmt)
  target_compile_definitions(${target} PRIVATE LACUNA_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/tests")
  add_dependencies(${target} lacuna_strategies)
endfunction()

# lacuna_test(<module> SOURCES a.cpp… [GPU_SOURCES b.cu…] [SLOW]): test_<module>, and with CUDA test_<module>_gpu (label gpu,
# skipped where there is no GPU). SLOW, GPU_SLOW: the cases of doctest suites named "slow" become a test of their own, label
# slow.
function(lacuna_test module)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SLOW;GPU_SLOW" "" "SOURCES;GPU_SOURCES")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "lacuna_test(${ARGV}): unexpected ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(arg_SOURCES)
    _lacuna_test_executable(${module} "" ${arg_SOURCES})
    if(arg_SLOW)
      add_test(NAME ${module} COMMAND test_${module} --test-suite-exclude=slow)
      add_test(NAME ${module}_slow COMMAND test_${module} --test-suite=slow)
      set_tests_properties(${module}_slow PROPERTIES LABELS slow)
    else()
      add_test(NAME ${module} COMMAND test_${module})
    endif()
    # Threads that spin between loops slow each other down when tests run side by side.
    foreach(name IN ITEMS ${module} ${module}_slow)
      if(TEST ${name})
        set_tests_properties(${name} PROPERTIES ENVIRONMENT OMP_WAIT_POLICY=passive)
      endif()
    endforeach()
  endif()
  if(LACUNA_CUDA AND arg_GPU_SOURCES)
    _lacuna_test_executable(${module} _gpu ${arg_GPU_SOURCES})
    target_compile_definitions(test_${module}_gpu PRIVATE LACUNA_GPU_TESTS)
    target_link_libraries(test_${module}_gpu PRIVATE CUDA::cudart_static)
    if(arg_GPU_SLOW)
      add_test(NAME ${module}_gpu COMMAND test_${module}_gpu --test-suite-exclude=slow)
      add_test(NAME ${module}_gpu_slow COMMAND test_${module}_gpu --test-suite=slow)
      set_tests_properties(${module}_gpu_slow PROPERTIES LABELS "gpu;slow" SKIP_RETURN_CODE 77)
    else()
      add_test(NAME ${module}_gpu COMMAND test_${module}_gpu)
    endif()
    set_tests_properties(${module}_gpu PROPERTIES LABELS gpu SKIP_RETURN_CODE 77)
    add_dependencies(gpu_tests test_${module}_gpu)
  endif()
endfunction()

# lacuna_bench(<name> SOURCES a.cpp…): the Google Benchmark program bench_<name>.
function(lacuna_bench name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES")
  add_executable(bench_${name} ${arg_SOURCES})
  target_link_libraries(bench_${name} PRIVATE lacuna::lacuna lacuna_flags benchmark::benchmark)
  target_compile_definitions(bench_${name} PRIVATE LACUNA_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
endfunction()
