#include "lacuna/strategy/library_id.hpp"

#include <elf.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/base/hash.hpp"

namespace lacuna {
namespace {

using u64 = std::uint64_t;

#if defined(__x86_64__)
constexpr Elf64_Half kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr Elf64_Half kMachine = EM_AARCH64;
#else
#error "name the ELF machine of this architecture"
#endif

struct Range {
  u64 begin, end;  // file offsets
};

class Image {
 public:
  explicit Image(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) refuse("a readable file", "one that cannot be opened");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    if (bytes_.size() < sizeof(Elf64_Ehdr) || std::memcmp(bytes_.data(), ELFMAG, SELFMAG) != 0) {
      refuse("an ELF shared library", bytes_.empty() ? "an empty file" : "a file of another kind");
    }
    header_ = at<Elf64_Ehdr>(0);
    constexpr unsigned char kData = std::endian::native == std::endian::little ? ELFDATA2LSB : ELFDATA2MSB;
    if (header_.e_ident[EI_CLASS] != ELFCLASS64 || header_.e_ident[EI_DATA] != kData || header_.e_machine != kMachine) {
      refuse(fmt::format("a 64-bit library for this machine (ELF machine {})", kMachine),
             fmt::format("one for ELF machine {}", header_.e_machine));
    }
    if (header_.e_type != ET_DYN && header_.e_type != ET_EXEC) {
      refuse("a linked shared library", header_.e_type == ET_REL ? "an object file (.o)" : "another kind of ELF file");
    }
    const u64 table = u64{header_.e_phnum} * sizeof(Elf64_Phdr);
    if (header_.e_phentsize != sizeof(Elf64_Phdr)) refuse("program headers of 56 bytes", "another size");
    require(header_.e_phoff, table);
  }

  std::string id() const {
    std::vector<Range> skipped = {{0, header_.e_ehsize}};  // holds the place of the section table, which a strip moves
    for_each_segment(PT_NOTE, [&](const Elf64_Phdr& segment) { add_build_id(segment, skipped); });
    std::sort(skipped.begin(), skipped.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    Hasher hash;
    for_each_segment(PT_LOAD, [&](const Elf64_Phdr& segment) {
      const u64 facts[] = {segment.p_vaddr, segment.p_memsz, segment.p_flags};
      hash.add(facts, sizeof facts);
      u64 from = segment.p_offset;
      const u64 end = segment.p_offset + segment.p_filesz;
      for (const Range& skip : skipped) {
        if (skip.end <= from || skip.begin >= end) continue;
        if (skip.begin > from) hash.add(bytes_.data() + from, skip.begin - from);
        from = std::min(skip.end, end);
      }
      hash.add(bytes_.data() + from, end - from);
    });
    return hash.hex();
  }

 private:
  [[noreturn]] void refuse(const std::string& expected, const std::string& found) const {
    throw Error({"not a shared library that can be loaded", expected, found, path_, ""});
  }
  // dlopen maps a truncated file and dies of SIGBUS later, so that lengths are checked here.
  void require(u64 offset, u64 length) const {
    if (offset > bytes_.size() || length > bytes_.size() - offset) {
      refuse("a whole file", fmt::format("one cut off at {} bytes", bytes_.size()));
    }
  }
  template <class T>
  T at(u64 offset) const {
    T out;
    std::memcpy(&out, bytes_.data() + offset, sizeof out);
    return out;
  }
  template <class F>
  void for_each_segment(Elf64_Word type, F f) const {
    for (u64 i = 0; i < header_.e_phnum; ++i) {
      const auto segment = at<Elf64_Phdr>(header_.e_phoff + i * sizeof(Elf64_Phdr));
      if (segment.p_type != type) continue;
      require(segment.p_offset, segment.p_filesz);
      f(segment);
    }
  }
  void add_build_id(const Elf64_Phdr& segment, std::vector<Range>& out) const {
    const u64 align = segment.p_align == 8 ? 8 : 4;
    const auto padded = [align](u64 n) { return (n + align - 1) / align * align; };
    const u64 end = segment.p_offset + segment.p_filesz;
    for (u64 p = segment.p_offset; p + sizeof(Elf64_Nhdr) <= end;) {
      const auto note = at<Elf64_Nhdr>(p);
      const u64 content_end = p + sizeof note + padded(note.n_namesz) + note.n_descsz;
      if (content_end > end) return;
      const u64 next = std::min(p + sizeof note + padded(note.n_namesz) + padded(note.n_descsz), end);
      if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == sizeof ELF_NOTE_GNU &&
          std::memcmp(bytes_.data() + p + sizeof note, ELF_NOTE_GNU, sizeof ELF_NOTE_GNU) == 0) {
        out.push_back({p, next});
      }
      p = next;
    }
  }

  std::string path_;
  std::vector<char> bytes_;
  Elf64_Ehdr header_{};
};

}  // namespace

std::string library_id(const std::string& path) { return Image(path).id(); }

}  // namespace lacuna
