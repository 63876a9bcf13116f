// Identity of built code.
#pragma once

#include <string>

namespace lacuna {

/// Hash of what an ELF library or program loads (the file contents of its PT_LOAD segments), 16 hex digits. The
/// build-id note and the ELF header do not count, nor does anything that is not loaded, so a copy, a stripped copy and
/// a rebuild of equal code have the same id. Throws Error when the file is not a whole 64-bit ELF image for this kind
/// of machine.
std::string library_id(const std::string& path);

}  // namespace lacuna
