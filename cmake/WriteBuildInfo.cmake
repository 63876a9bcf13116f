# Run at build time (cmake -P): the commit may have changed since configuration.
execute_process(
  COMMAND git -C "${SOURCE_DIR}" describe --always --abbrev=12 --exclude=* --dirty
  OUTPUT_VARIABLE COMMIT
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(COMMIT "unknown")
endif()
if(SANITIZE)
  string(APPEND FLAGS " -fsanitize=${SANITIZE}")
endif()
string(STRIP "${FLAGS}" FLAGS)
configure_file("${CMAKE_CURRENT_LIST_DIR}/build_info.hpp.in" "${OUTPUT}" @ONLY)
