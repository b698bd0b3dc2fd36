package daemon

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"

	"github.com/droverproject/drover/nbd"
)

// RuleKind is what a rule looks at.
type RuleKind string

// The kinds of rules.
const (
	RuleUID RuleKind = "uid" // the user of a process that came over a unix socket
	RuleGID RuleKind = "gid" // its primary group
	RuleCN  RuleKind = "cn"  // the common name in a client's certificate
	RuleSAN RuleKind = "san" // a DNS name, IP address, e-mail address or URI in a client's certificate
)

// Rule names clients.
type Rule struct {
	Kind RuleKind
	Name string // for cn and san
	ID   uint32 // for uid and gid
}

// NewRule makes a rule. Users and groups are numbers, or names of this host.
func NewRule(kind RuleKind, value string) (Rule, error) {
	if value == "" {
		return Rule{}, fmt.Errorf("rule %s: names nobody", kind)
	}
	r := Rule{Kind: kind, Name: value}
	var err error
	switch kind {
	case RuleUID:
		r.ID, err = lookupID(value, userID)
	case RuleGID:
		r.ID, err = lookupID(value, groupID)
	case RuleCN, RuleSAN:
	default:
		err = errors.New("a rule is one of uid, gid, cn and san")
	}
	if err != nil {
		return Rule{}, fmt.Errorf("rule %s:%s: %w", kind, value, err)
	}
	return r, nil
}

// ParseRule reads a rule of the form KIND:VALUE.
func ParseRule(text string) (Rule, error) {
	kind, value, ok := strings.Cut(text, ":")
	if !ok {
		return Rule{}, fmt.Errorf("rule %q: expecting uid:, gid:, cn: or san: and a value", text)
	}
	return NewRule(RuleKind(kind), value)
}

// ParseID reads the number of a user or group.
func ParseID(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	// The highest number means "none" to the system calls that take one.
	if err != nil || n == 1<<32-1 {
		return 0, fmt.Errorf("%q is not the number of a user or group", text)
	}
	return uint32(n), nil
}

// lookupID takes a number as it is and asks the host for a name.
func lookupID(text string, byName func(string) (string, error)) (uint32, error) {
	if text == "" || text[0] < '0' || text[0] > '9' {
		id, err := byName(text)
		if err != nil {
			return 0, err
		}
		text = id
	}
	return ParseID(text)
}

func userID(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

func groupID(name string) (string, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}

// NeedsSocket reports whether the rule can only match clients of unix sockets, the alternative being clients with a
// certificate.
func (r Rule) NeedsSocket() bool { return r.Kind == RuleUID || r.Kind == RuleGID }

// Matches reports whether the rule names a client.
func (r Rule) Matches(p nbd.Peer) bool {
	switch r.Kind {
	case RuleUID:
		return p.Process != nil && p.Process.UID == r.ID
	case RuleGID:
		return p.Process != nil && p.Process.GID == r.ID
	case RuleCN:
		return p.Certificate != nil && p.Certificate.Subject.CommonName == r.Name
	case RuleSAN:
		return p.Certificate != nil && hasAltName(p.Certificate, r.Name)
	}
	return false
}

func hasAltName(cert *x509.Certificate, name string) bool {
	for _, n := range cert.DNSNames {
		if strings.EqualFold(n, name) {
			return true
		}
	}
	for _, n := range cert.EmailAddresses {
		if n == name {
			return true
		}
	}
	for _, n := range cert.IPAddresses {
		if n.String() == name {
			return true
		}
	}
	for _, n := range cert.URIs {
		if n.String() == name {
			return true
		}
	}
	return false
}

// Rules allow whom one of them names.
type Rules []Rule

// Allow is for nbd.Export. No rules at all allow everybody.
func (rules Rules) Allow(p nbd.Peer) bool {
	for _, r := range rules {
		if r.Matches(p) {
			return true
		}
	}
	return len(rules) == 0
}
