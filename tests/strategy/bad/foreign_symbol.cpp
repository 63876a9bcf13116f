// The symbol's name is right, what stands behind it is not.
extern "C" long lacuna_plugin[2];
long lacuna_plugin[2] = {0x7363617265, 42};
