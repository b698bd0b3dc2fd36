package daemon

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/droverproject/drover/nbd"
)

func TestRules(t *testing.T) {
	link, err := url.Parse("spiffe://lan/vm1")
	if err != nil {
		t.Fatal(err)
	}
	user := nbd.Peer{Network: "unix", Process: &nbd.Process{PID: 1, UID: 1000, GID: 0}}
	machine := nbd.Peer{Network: "tcp", Encrypted: true, Certificate: &x509.Certificate{
		Subject: pkix.Name{CommonName: "vm1"}, DNSNames: []string{"vm1.LAN"}, EmailAddresses: []string{"vm1@lan"},
		IPAddresses: []net.IP{net.IPv4(10, 0, 0, 7)}, URIs: []*url.URL{link},
	}}
	stranger := nbd.Peer{Network: "tcp", Encrypted: true}
	for text, want := range map[string]struct{ user, machine bool }{
		"uid:1000": {true, false}, "uid:1001": {}, "uid:0": {}, "uid:root": {}, "gid:0": {true, false}, "gid:root": {true, false},
		"gid:1000": {}, "cn:vm1": {false, true}, "cn:VM1": {}, "cn:vm1.lan": {}, "san:vm1.lan": {false, true}, "san:vm1": {},
		"san:vm1@lan": {false, true}, "san:10.0.0.7": {false, true}, "san:10.0.0.8": {}, "san:spiffe://lan/vm1": {false, true},
	} {
		r, err := ParseRule(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if r.Matches(user) != want.user || r.Matches(machine) != want.machine || r.Matches(stranger) {
			t.Errorf("%s: user %v, machine %v, stranger %v", text, r.Matches(user), r.Matches(machine), r.Matches(stranger))
		}
	}
	for _, text := range []string{
		"", "uid", "uid:", "uid:-1", "uid:4294967295", "uid:99999999999", "uid:no-such-user-here", "gid:no-such-group", "cn:",
		"who:me", "uid:1000x",
	} {
		if r, err := ParseRule(text); err == nil {
			t.Errorf("%q is rule %+v", text, r)
		}
	}
	rules := Rules{{Kind: RuleUID, ID: 5}, {Kind: RuleCN, Name: "vm1"}}
	if rules.Allow(user) || !rules.Allow(machine) || rules.Allow(stranger) || !Rules(nil).Allow(stranger) {
		t.Error("rules do not allow whom one of them names")
	}
}

func TestParseUser(t *testing.T) {
	for text, want := range map[string]User{"root": {0, 0}, "0": {0, 0}, "1234:5678": {1234, 5678}, "0:77": {0, 77}} {
		if u, err := ParseUser(text); err != nil || *u != want {
			t.Errorf("%s: %v, %v", text, u, err)
		}
	}
	for _, text := range []string{"", ":", "root:", ":root", "-1:0", "no-such-user-here", "4294967295:0"} {
		if u, err := ParseUser(text); err == nil {
			t.Errorf("%q is %+v", text, u)
		}
	}
	if _, err := ParseUser("3999999999"); err == nil || !strings.Contains(err.Error(), "USER:GROUP") {
		t.Errorf("a user without a known group: %v", err)
	}
}
