package cli

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/block/filter"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/client"
)

// netObjects are the objects of a command line that serves: secrets, TLS credentials, and who is let in.
type netObjects struct {
	secrets objectFlags
	creds   map[string]tlsCreds
	authz   map[string]authorizer
	groups  map[string]*filter.ThrottleGroup
	others  map[string]bool // those without effect here
}

// tlsCreds are the credentials of an object.
type tlsCreds struct {
	kind   string // its type
	server bool
	dir    string
	verify bool
	config *tls.Config
}

// authorizer decides by the distinguished name in a client's certificate.
type authorizer func(name string) bool

// objectsWithoutEffect can be made but have nothing to do with how drover works.
var objectsWithoutEffect = []string{"iothread", "main-loop", "tls-cipher-suites", "thread-context"}

// add makes an object, which may use those before it.
func (o *netObjects) add(text string) error {
	props, err := objectProperties(text)
	if err != nil {
		return err
	}
	kind := props["qom-type"]
	if kind == "" || kind == "secret" {
		o.secrets.texts = append(o.secrets.texts, text)
		_, err := o.secrets.parse()
		return err
	}
	if !slices.Contains(objectsWithoutEffect, kind) && kind != "throttle-group" && !strings.HasPrefix(kind, "tls-creds-") && !strings.HasPrefix(kind, "authz-") {
		return errorf("Parameter 'qom-type' does not accept value '%s'", kind)
	}
	id, ok := props["id"]
	if !ok {
		return errorf("Parameter 'id' is missing")
	}
	if !objectID().MatchString(id) {
		return errorf("Parameter 'id' expects an identifier\n" +
			"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
	}
	if o.taken(id) {
		return errorf("attempt to add duplicate property '%s' to object (type 'container')", id)
	}
	delete(props, "qom-type")
	delete(props, "id")
	return o.make(kind, id, props)
}

func (o *netObjects) taken(id string) bool {
	_, creds := o.creds[id]
	_, authz := o.authz[id]
	return creds || authz || o.groups[id] != nil || o.others[id]
}

func (o *netObjects) make(kind, id string, props map[string]string) error {
	switch kind {
	case "tls-creds-x509", "tls-creds-anon", "tls-creds-psk":
		c, err := newTLSCreds(kind, props)
		if err != nil {
			return err
		}
		if o.creds == nil {
			o.creds = make(map[string]tlsCreds)
		}
		o.creds[id] = c
		return nil
	case "authz-simple", "authz-list", "authz-listfile":
		a, err := newAuthorizer(kind, props)
		if err != nil {
			return err
		}
		if o.authz == nil {
			o.authz = make(map[string]authorizer)
		}
		o.authz[id] = a
		return nil
	case "throttle-group":
		g, err := filter.NewThrottleGroup(props)
		if err != nil {
			return err
		}
		if o.groups == nil {
			o.groups = make(map[string]*filter.ThrottleGroup)
		}
		o.groups[id] = g
		return nil
	}
	if strings.HasPrefix(kind, "authz-") {
		return errorf("invalid object type: %s", kind)
	}
	if o.others == nil {
		o.others = make(map[string]bool)
	}
	o.others[id] = true
	return nil
}

// lookup returns the object of a kind that nodes use, by its ID.
func (o *netObjects) lookup(kind, id string) (any, error) {
	switch kind {
	case filter.ObjectThrottleGroup:
		if g, ok := o.groups[id]; ok {
			return g, nil
		}
	case client.ObjectTLS:
		c, err := o.credentials(id, false)
		if err != nil {
			return nil, errors.New(strings.TrimPrefix(err.Error(), "Failed to get TLS creds: "))
		}
		return c.config, nil
	}
	return nil, block.ErrNoObject
}

// objectProperties takes TYPE,id=ID,NAME=VALUE,... or the same as a JSON object apart. What is nested has names with dots.
func objectProperties(text string) (map[string]string, error) {
	props := make(map[string]string)
	if strings.HasPrefix(text, "{") {
		var top map[string]any
		if err := json.Unmarshal([]byte(text), &top); err != nil {
			return nil, errors.New("JSON parse error in an object") // without its text, which may hold a secret
		}
		flattenProperties(props, "", top)
		return props, nil
	}
	for i, part := range splitOptions(text) {
		name, value, given := strings.Cut(part, "=")
		if !given && i == 0 {
			name, value = "qom-type", part
		}
		props[name] = value
	}
	return props, nil
}

func flattenProperties(out map[string]string, name string, v any) {
	below := func(key string) string {
		if name == "" {
			return key
		}
		return name + "." + key
	}
	switch v := v.(type) {
	case map[string]any:
		for key, v := range v {
			flattenProperties(out, below(key), v)
		}
	case []any:
		for i, v := range v {
			flattenProperties(out, below(strconv.Itoa(i)), v)
		}
	case string:
		out[name] = v
	case bool:
		out[name] = map[bool]string{true: "on", false: "off"}[v]
	default:
		out[name] = fmt.Sprint(v)
	}
}

// onlyProperties refuses properties that an object does not have.
func onlyProperties(props map[string]string, known ...string) error {
	for name := range props {
		if !slices.Contains(known, name) {
			return errorf("Parameter '%s' is unexpected", name)
		}
	}
	return nil
}

func newTLSCreds(kind string, props map[string]string) (tlsCreds, error) {
	c := tlsCreds{kind: kind, dir: props["dir"], verify: true}
	known := []string{"endpoint", "verify-peer", "dir", "priority"}
	switch kind {
	case "tls-creds-x509":
		known = append(known, "sanity-check", "passwordid")
	case "tls-creds-psk":
		known = append(known, "username")
	}
	if err := onlyProperties(props, known...); err != nil {
		return c, err
	}
	switch props["endpoint"] {
	case "server":
		c.server = true
	case "", "client":
	default:
		return c, errorf("Parameter 'endpoint' does not accept value '%s'", props["endpoint"])
	}
	switch v := props["verify-peer"]; v {
	case "", "on", "yes", "true", "y":
	case "off", "no", "false", "n":
		c.verify = false
	default:
		return c, errorf("Parameter 'verify-peer' expects 'on' or 'off'")
	}
	if kind != "tls-creds-x509" {
		return c, nil // said when it is used
	}
	if c.dir == "" {
		return c, errorf("Missing 'dir' property value")
	}
	files, load := []string{"ca-cert.pem"}, daemon.LoadClientTLS
	if c.server {
		files, load = []string{"ca-cert.pem", "server-cert.pem", "server-key.pem"}, daemon.LoadTLS
	}
	for _, name := range files {
		if err := accessible(filepath.Join(c.dir, name)); err != nil {
			return c, err
		}
	}
	var err error
	c.config, err = load(c.dir, c.verify)
	return c, err
}

func accessible(name string) error {
	if _, err := os.Stat(name); err != nil {
		return errorf("Unable to access credentials %s: %s", name, systemReason(err))
	}
	return nil
}

// serverTLS returns the encryption of a server with the credentials and the authorizer of the given names, nil for none.
func (o *netObjects) serverTLS(creds, authz string) (*nbd.TLS, error) {
	if creds == "" {
		if authz != "" {
			return nil, errorf("--tls-authz is not permitted without --tls-creds")
		}
		return nil, nil
	}
	c, err := o.credentials(creds, true)
	if err != nil {
		return nil, err
	}
	config := c.config.Clone()
	if authz == "" {
		return &nbd.TLS{Config: config, Required: true}, nil
	}
	allow, ok := o.authz[authz]
	if !ok {
		// QEMU finds out when the first client comes, and lets nobody in.
		return nil, errorf("No authorization object with id '%s'", authz)
	}
	verify := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if verify != nil {
			if err := verify(state); err != nil {
				return err
			}
		}
		return authorize(allow, state)
	}
	return &nbd.TLS{Config: config, Required: true}, nil
}

// credentials finds the credentials of a name, for a server or for a client.
func (o *netObjects) credentials(id string, server bool) (tlsCreds, error) {
	c, ok := o.creds[id]
	if !ok {
		// QEMU tells that an object is something else from that there is none.
		known, err := o.secrets.parse()
		if err != nil {
			return c, err
		}
		if _, ok := known[id]; ok || o.taken(id) {
			return c, errorf("Failed to get TLS creds: Object with id '%s' is not TLS credentials", id)
		}
		return c, errorf("Failed to get TLS creds: No TLS credentials with id '%s'", id)
	}
	switch {
	case c.kind != "tls-creds-x509":
		return c, errorf("Failed to get TLS creds: credentials of type %s are not supported, only tls-creds-x509", c.kind)
	case c.server != server && server:
		return c, errorf("Failed to get TLS creds: Expected TLS credentials for a server endpoint")
	case c.server != server:
		return c, errorf("Failed to get TLS creds: Expected TLS credentials for a client endpoint")
	}
	return c, nil
}

var errNoCertificate = errors.New("the client has shown no certificate, by which it could be let in")

// authorize asks about the client at the other end of a connection.
func authorize(allow authorizer, state tls.ConnectionState) error {
	if len(state.VerifiedChains) == 0 {
		return errNoCertificate
	}
	name, err := distinguishedName(state.PeerCertificates[0])
	if err != nil {
		return err
	}
	if !allow(name) {
		return fmt.Errorf("TLS x509 authz check for %s is denied", name)
	}
	return nil
}

// distinguishedName is the name of a certificate's subject as RFC 4514 has it, with all its parts in their order.
func distinguishedName(cert *x509.Certificate) (string, error) {
	var name pkix.RDNSequence
	if rest, err := asn1.Unmarshal(cert.RawSubject, &name); err != nil || len(rest) != 0 {
		return "", errors.New("the subject of the client's certificate cannot be understood")
	}
	return name.String(), nil
}

func newAuthorizer(kind string, props map[string]string) (authorizer, error) {
	switch kind {
	case "authz-simple":
		return newSimple(props)
	case "authz-list":
		return newList(props)
	}
	name, ok := props["filename"]
	if !ok {
		return nil, errorf("Parameter 'filename' is missing")
	}
	if err := onlyProperties(props, "filename", "refresh"); err != nil {
		return nil, err
	}
	return newListFile(name)
}

func newSimple(props map[string]string) (authorizer, error) {
	identity, ok := props["identity"]
	if !ok {
		return nil, errorf("Parameter 'identity' is missing")
	}
	return func(name string) bool { return name == identity }, onlyProperties(props, "identity")
}

// newListFile reads the rules that a file has, once.
func newListFile(name string) (authorizer, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, errorf("Unable to read '%s': %w", name, err)
	}
	var top map[string]any
	if err := json.Unmarshal(text, &top); err != nil {
		return nil, errorf("Unable to read '%s': JSON parse error: %w", name, err)
	}
	props := make(map[string]string)
	flattenProperties(props, "", top)
	return newList(props)
}

// rule is one of an authz-list: the first that matches decides.
type rule struct {
	match string
	glob  bool
	allow bool
}

func newList(props map[string]string) (authorizer, error) {
	fallback, err := allows(props, "policy", "deny")
	if err != nil {
		return nil, err
	}
	known := []string{"policy", "refresh"}
	var rules []rule
	for i := 0; ; i++ {
		key := func(name string) string { return fmt.Sprintf("rules.%d.%s", i, name) }
		match, ok := props[key("match")]
		if !ok {
			break
		}
		r := rule{match: match}
		if r.allow, err = allows(props, key("policy"), ""); err != nil {
			return nil, err
		}
		switch format := props[key("format")]; format {
		case "", "exact":
		case "glob":
			r.glob = true
		default:
			return nil, errorf("Parameter 'rules[%d].format' does not accept value '%s'", i, format)
		}
		rules = append(rules, r)
		known = append(known, key("match"), key("policy"), key("format"))
	}
	if err := onlyProperties(props, known...); err != nil {
		return nil, err
	}
	return func(name string) bool {
		for _, r := range rules {
			if r.matches(name) {
				return r.allow
			}
		}
		return fallback
	}, nil
}

// matches compares a name. In a glob a star stands for anything, a question mark for one character.
func (r rule) matches(name string) bool {
	if !r.glob {
		return r.match == name
	}
	// Neither a slash nor what stands for sets of characters elsewhere is special here.
	hide := strings.NewReplacer("/", "\x00")
	pattern := strings.NewReplacer("/", "\x00", `\`, `\\`, "[", `\[`).Replace(r.match)
	ok, err := path.Match(pattern, hide.Replace(name))
	return err == nil && ok
}

// allows reads a policy.
func allows(props map[string]string, key, fallback string) (bool, error) {
	value, ok := props[key]
	if !ok {
		value = fallback
	}
	switch value {
	case "allow":
		return true, nil
	case "deny":
		return false, nil
	case "":
		return false, errorf("Parameter '%s' is missing", key)
	}
	return false, errorf("Parameter '%s' does not accept value '%s'", key, value)
}
