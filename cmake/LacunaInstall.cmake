# Installed layout: bin/lacuna, lib/liblacuna.so, lib/lacuna/plugins/*.so, lib/cmake/lacuna, include/lacuna.
include(CMakePackageConfigHelpers)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/lacuna")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/core/include/lacuna" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS lacuna lacuna_sdk EXPORT lacunaTargets)
install(TARGETS lacuna_cli)
install(TARGETS ${LACUNA_STRATEGY_TARGETS} DESTINATION "${CMAKE_INSTALL_LIBDIR}/lacuna/plugins")

install(EXPORT lacunaTargets NAMESPACE lacuna:: DESTINATION "${package_dir}")
configure_package_config_file(cmake/lacunaConfig.cmake.in "${PROJECT_BINARY_DIR}/lacunaConfig.cmake"
                              INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lacunaConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/lacunaConfig.cmake" "${PROJECT_BINARY_DIR}/lacunaConfigVersion.cmake"
              cmake/LacunaPlugin.cmake DESTINATION "${package_dir}")
