namespace lacuna {
int not_in_the_sdk();
}
extern "C" int answer() { return lacuna::not_in_the_sdk(); }
