package cli

import (
	"errors"
	"io/fs"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/nbd"
)

// Ways to say --sandbox.
const (
	sandboxStrict = "strict"
	sandboxTry    = "best-effort"
)

// securityFlags say who may come in, what they may take, and what the server itself may do.
type securityFlags struct {
	socketMode    string
	tlsCreds      string
	tlsVerifyPeer bool
	allowUID      []string
	allowGID      []string
	allowCN       []string
	allowSAN      []string
	exportAllow   []string
	perClient     int
	memory        string
	stall         time.Duration
	sandbox       string
	user          string
	owner         *daemon.User // of sockets: --user
	creds         *daemon.Credentials
}

func (s *securityFlags) add(f *pflag.FlagSet) {
	f.StringVar(&s.socketMode, "socket-mode", "0600", "permissions of the unix sockets, as an octal `number`")
	f.StringVar(&s.tlsCreds, "tls-creds", "",
		"accept only TLS, with server-cert.pem, server-key.pem and ca-cert.pem from `DIR`")
	f.BoolVar(&s.tlsVerifyPeer, "tls-verify-peer", true, "accept only clients with a certificate signed by ca-cert.pem's CA")
	f.StringArrayVar(&s.allowUID, "allow-uid", nil, "let a `USER` of this host use the exports (may be repeated)")
	f.StringArrayVar(&s.allowGID, "allow-gid", nil, "let users whose primary group is `GROUP` use the exports (may be repeated)")
	f.StringArrayVar(&s.allowCN, "allow-cn", nil, "let clients whose certificate has the common `name` use them (may be repeated)")
	f.StringArrayVar(&s.allowSAN, "allow-san", nil,
		"let clients whose certificate has the alternative `name` use them (may be repeated)")
	f.StringArrayVar(&s.exportAllow, "export-allow", nil,
		"for one export, instead of --allow-...: `NAME=RULE[,RULE...]` with rules like uid:1000, gid:kvm, cn:alice, san:vm1.lan")
	f.IntVar(&s.perClient, "max-connections-per-client", 0,
		"close connections beyond `N` of one user (unix socket) or address (TCP), 0 for any number")
	f.StringVar(&s.memory, "max-memory", "1G", "`size` of all requests and replies together that may be held in memory")
	f.DurationVar(&s.stall, "stall-timeout", 5*time.Minute,
		"`time` that a client may take for a MiB of its replies or writes before it is cut off, 0 for ever")
	f.StringVar(&s.sandbox, "sandbox", "",
		"before serving, give up all files not yet open and all privileges; with `MODE` best-effort, as far as possible")
	f.Lookup("sandbox").NoOptDefVal = sandboxStrict
	f.StringVar(&s.user, "user", "", "before serving, become `USER[:GROUP]`, who also gets the unix sockets")
}

// complete puts into c what the flags say. The exports and addresses are there already.
func (s *securityFlags) complete(c *daemon.Config) error {
	for _, step := range []func(*daemon.Config) error{s.limits, s.sockets, s.authorise, s.encrypt} {
		if err := step(c); err != nil {
			return err
		}
	}
	if s.sandbox != "" && s.sandbox != sandboxStrict && s.sandbox != sandboxTry {
		return usagef("--sandbox=%s: expecting %s or %s", s.sandbox, sandboxStrict, sandboxTry)
	}
	return nil
}

func (s *securityFlags) limits(c *daemon.Config) error {
	if s.perClient < 0 || s.stall < 0 {
		return usagef("--max-connections-per-client and --stall-timeout must not be negative")
	}
	n, err := block.ParseSize(s.memory)
	if err != nil || n <= 0 {
		return usagef("--max-memory %s is not a size", s.memory)
	}
	c.NBD.MaxConnectionsPerClient = s.perClient
	c.NBD.MaxTotalMemory = n
	c.NBD.StallTimeout = orForever(s.stall)
	return nil
}

// sockets sets what is the same for all unix sockets.
func (s *securityFlags) sockets(c *daemon.Config) error {
	mode, err := strconv.ParseUint(s.socketMode, 8, 32)
	if err != nil || mode == 0 || mode > 0o777 {
		return usagef("--socket-mode %s is not a file mode such as 0660", s.socketMode)
	}
	if s.user != "" {
		if s.owner, err = daemon.ParseUser(s.user); err != nil {
			return usagef("--user: %v", err)
		}
	}
	for i := range c.Addresses {
		c.Addresses[i].Mode, c.Addresses[i].Owner = fs.FileMode(mode), s.owner
	}
	return nil
}

// authorise attaches rules to exports.
func (s *securityFlags) authorise(c *daemon.Config) error {
	general, err := s.generalRules()
	if err != nil {
		return err
	}
	own := make(map[string]daemon.Rules)
	for _, text := range s.exportAllow {
		name, list, ok := strings.Cut(text, "=")
		if !ok {
			return usagef("--export-allow %s: expecting NAME=RULE[,RULE...]", text)
		}
		for _, one := range strings.Split(list, ",") {
			r, err := daemon.ParseRule(one)
			if err != nil {
				return usagef("--export-allow %s: %v", text, err)
			}
			own[name] = append(own[name], r)
		}
	}
	if err := s.possible(c, general); err != nil {
		return err
	}
	if len(general) > 0 {
		c.Template.Allow = general.Allow
	}
	for i := range c.Exports {
		rules := general
		if r, ok := own[c.Exports[i].Name]; ok {
			rules = r
			delete(own, c.Exports[i].Name)
			if err := s.possible(c, r); err != nil {
				return err
			}
		}
		if len(rules) > 0 {
			c.Exports[i].Allow = rules.Allow
		}
	}
	for name := range own {
		return usagef("--export-allow: there is no export %q", name)
	}
	return nil
}

func (s *securityFlags) generalRules() (daemon.Rules, error) {
	var rules daemon.Rules
	for _, group := range []struct {
		kind   daemon.RuleKind
		values []string
	}{
		{daemon.RuleUID, s.allowUID}, {daemon.RuleGID, s.allowGID}, {daemon.RuleCN, s.allowCN}, {daemon.RuleSAN, s.allowSAN},
	} {
		for _, v := range group.values {
			r, err := daemon.NewRule(group.kind, v)
			if err != nil {
				return nil, usagef("--allow-%s: %v", group.kind, err)
			}
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// possible refuses rules that cannot match anybody: their author believes that the server knows more than it does.
func (s *securityFlags) possible(c *daemon.Config, rules daemon.Rules) error {
	for _, r := range rules {
		switch {
		case r.NeedsSocket() && runtime.GOOS != "linux":
			return usagef("rules about users and groups need Linux: %s does not say who connects", runtime.GOOS)
		case r.NeedsSocket() && !anySocket(c):
			return usagef("rules about users and groups need a --socket: nobody knows who connects over TCP")
		case !r.NeedsSocket() && (s.tlsCreds == "" || !s.tlsVerifyPeer):
			return usagef("rules about certificates need --tls-creds with --tls-verify-peer")
		}
	}
	return nil
}

func anySocket(c *daemon.Config) bool {
	for _, a := range c.Addresses {
		if a.Socket != "" {
			return true
		}
	}
	for _, l := range c.Listeners {
		if l.Addr().Network() == "unix" {
			return true
		}
	}
	return false
}

func (s *securityFlags) encrypt(c *daemon.Config) error {
	if s.tlsCreds == "" {
		return nil
	}
	var err error
	if s.creds, err = daemon.LoadCredentials(s.tlsCreds, s.tlsVerifyPeer); err != nil {
		return err
	}
	c.NBD.TLS = &nbd.TLS{Config: s.creds.Config(), Required: true}
	return nil
}

// confine gives up what d does not need any more, now that everything is open.
func (a *app) confine(s *securityFlags, d *daemon.Daemon) error {
	c := daemon.Confinement{Sandbox: s.sandbox != "", BestEffort: s.sandbox == sandboxTry, Removable: d.SocketFolders()}
	if s.user != "" {
		var err error
		if c.User, err = daemon.ParseUser(s.user); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	if c.Sandbox {
		d.Seal("the server is in a sandbox (--sandbox) and can open no more files: stop it, and name the image when it is started")
	}
	notes, err := daemon.Confine(c)
	for _, n := range notes {
		a.say("%s", n)
	}
	if err != nil {
		return errors.Join(err, d.Close())
	}
	return nil
}
