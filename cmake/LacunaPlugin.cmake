# CMake 3.25 does not know that nvcc takes C++20.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()

# lacuna_add_plugin(<name> SOURCES a.cpp…): the strategy library <name>.so, as target plugin_<name>.
#
# Used by the built-in strategies and, through find_package(lacuna), by everybody else. Where the project has enabled CUDA
# the .cpp files are compiled by nvcc, so that one source gives the loops of both back-ends. A plug-in links the header-only
# SDK alone: an undefined symbol is refused at link time, and nothing but its descriptor is exported.
function(lacuna_add_plugin name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES")
  if(NOT arg_SOURCES OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "lacuna_add_plugin(${ARGV}): expected a name, then SOURCES and at least one file")
  endif()
  set(target plugin_${name})
  add_library(${target} MODULE ${arg_SOURCES})
  if(CMAKE_CUDA_COMPILER)
    set(cpp_sources ${arg_SOURCES})
    list(FILTER cpp_sources INCLUDE REGEX "\\.cpp$")
    set_source_files_properties(${cpp_sources} PROPERTIES LANGUAGE CUDA)
  endif()
  target_link_libraries(${target} PRIVATE lacuna::sdk)
  target_link_options(${target} PRIVATE LINKER:--no-undefined)
  set_target_properties(
    ${target}
    PROPERTIES PREFIX ""
               OUTPUT_NAME ${name}
               CUDA_STANDARD 20
               CUDA_STANDARD_REQUIRED ON
               CXX_VISIBILITY_PRESET hidden
               CUDA_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON
               INSTALL_RPATH "")
endfunction()
