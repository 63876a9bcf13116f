# Installs the build into an empty prefix, builds plugins/ there against the package alone (with CUDA where the build has it),
# and checks each result with the installed command.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
set(prefix "${WORK_DIR}/prefix")
set(consumer "${WORK_DIR}/plugins")
run(${CMAKE_COMMAND} --install "${BUILD_DIR}" --prefix "${prefix}")

# A copy, so that nothing beside it in the source tree can be found by accident.
file(COPY "${SOURCE_DIR}/plugins" DESTINATION "${WORK_DIR}/source")
# By the environment, since a list of architectures would fall apart as an argument.
set(cuda OFF)
if(CUDA)
  set(cuda ON)
  set(ENV{CUDACXX} "${NVCC}")
  set(ENV{CUDAARCHS} "${ARCHITECTURES}")
endif()
run(${CMAKE_COMMAND} -S "${WORK_DIR}/source/plugins" -B "${consumer}" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${CXX}"
    "-DCMAKE_PREFIX_PATH=${prefix}" -DCMAKE_BUILD_TYPE=Release -DPLUGINS_CUDA=${cuda})
run(${CMAKE_COMMAND} --build "${consumer}")

file(GLOB_RECURSE plugins "${consumer}/*.so")
if(NOT plugins)
  message(FATAL_ERROR "${consumer}: expected at least one plug-in (*.so)")
endif()
foreach(plugin IN LISTS plugins)
  run("${prefix}/${BINDIR}/lacuna" check "${plugin}")
endforeach()
