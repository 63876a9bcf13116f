// Layer budgets by entropy: layers that spread their attention get more. Ours.
//
//   e_l = mean entropy of the dense attention rows of layer l's prompt queries
//   layer l gets C N e_l / sum of e, with C = mean target of a head and N = layers; at most all cached tokens, and what
//   a layer cannot use goes to the others in the same proportion
//
// Forced tokens are inside. Equal budgets where no layer has any entropy.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct LayerEntropy : Strategy {
  static Info info() {
    Info i{};
    i.name = "layer_entropy";
    i.summary = "layer budgets in proportion to the mean entropy of the layer's attention";
    i.paper = "-";
    i.rule = "layer l gets C N e_l / sum of e, e_l = mean entropy of its prompt rows";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.needs = kNeedsStatistics;
    return i;
  }

  void allocate_layers(Context&, LayerBudget& b) override {
    if (!b.entropy) throw Failure("no statistics of the layers' attention");
    const double most = static_cast<double>(b.cached_tokens);
    double left = static_cast<double>(b.mean_tokens) * b.num_layers, weight = 0;
    for (i32 l = 0; l < b.num_layers; ++l) weight += b.entropy[l];
    if (weight <= 0) return;
    std::vector<u8> full(static_cast<std::size_t>(b.num_layers));
    for (bool again = true; again;) {  // layers whose share is all that there is
      again = false;
      for (i32 l = 0; l < b.num_layers; ++l) {
        u8& fixed = full[static_cast<std::size_t>(l)];
        if (fixed || b.entropy[l] <= 0 || left * b.entropy[l] < most * weight) continue;
        fixed = 1;
        b.tokens[l] = most;
        left -= most;
        weight -= b.entropy[l];
        again = true;
      }
    }
    for (i32 l = 0; l < b.num_layers; ++l)
      if (!full[static_cast<std::size_t>(l)]) b.tokens[l] = b.entropy[l] > 0 ? left * b.entropy[l] / weight : 0;
  }
};
}  // namespace

LACUNA_PLUGIN(LayerEntropy)
