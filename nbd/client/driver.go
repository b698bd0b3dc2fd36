package client

//lint:file-ignore ST1005 these errors say what QEMU says

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd/internal/wire"
	"github.com/droverproject/drover/storage"
)

// ObjectTLS is the kind of object that the option "tls-creds" names, for block.OpenOptions.Object: a *tls.Config.
const ObjectTLS = "tls-creds"

func init() {
	block.RegisterDriver(block.Driver{
		Name:      "nbd",
		Prefixes:  []string{"nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"},
		ParseName: nameOptions,
		NodeName:  nodeName,
		OpenFile:  openNode,
	})
}

// nameOptions turns a name into a node's options.
func nameOptions(name string) (block.Options, error) {
	t, err := ParseName(name)
	if err != nil {
		return nil, err
	}
	o := block.Options{}
	if t.Address.Host == "" {
		o["server.type"], o["server.path"] = "unix", t.Address.Path
	} else {
		o["server.type"], o["server.host"], o["server.port"] = "inet", t.Address.Host, t.Address.Port
	}
	if t.Export != "" {
		o["export"] = t.Export
	}
	if t.TLS {
		o["tls"] = "on"
	}
	return o, nil
}

// nodeName is the name of a node that says all about it.
func nodeName(o block.Options) (string, bool) {
	t := Target{Export: o["export"], TLS: o["tls"] == "on"}
	switch {
	case o["server.path"] != "" || o["path"] != "":
		t.Address.Path = o["server.path"] + o["path"]
	case o["server.host"] != "" || o["host"] != "":
		t.Address.Host, t.Address.Port = o["server.host"]+o["host"], o["server.port"]+o["port"]
		if t.Address.Port == "" {
			t.Address.Port = wire.DefaultPort
		}
	default:
		return "", false
	}
	return t.URI(), true
}

func openNode(ctx context.Context, n *block.Node) (storage.File, error) {
	o := Options{ReadOnly: n.ReadOnly, AutoReadOnly: n.AutoReadOnly}
	var err error
	if o.Address, err = takeAddress(n); err != nil {
		return nil, err
	}
	o.Export, _ = n.Take("export")
	o.Context, _ = n.Take("x-dirty-bitmap")
	if len(o.Export) > wire.MaxString {
		return nil, errors.New("export name too long to send to server")
	}
	if len(o.Context) > wire.MaxString {
		return nil, errors.New("x-dirty-bitmap query too long to send to server")
	}
	if o.ReconnectDelay, err = takeSeconds(n, "reconnect-delay"); err != nil {
		return nil, err
	}
	if o.OpenTimeout, err = takeSeconds(n, "open-timeout"); err != nil {
		return nil, err
	}
	connections, err := takeNumber(n, "multi-conn")
	if err != nil {
		return nil, err
	}
	o.Connections = int(min(connections, 16))
	if o.TLS, err = takeTLS(n); err != nil {
		return nil, err
	}
	o.Hostname, _ = n.Take("tls-hostname")
	if o.Hostname != "" && o.TLS == nil {
		return nil, errors.New("tls-hostname not supported without tls-creds")
	}
	return Open(ctx, o)
}

func takeAddress(n *block.Node) (Address, error) {
	var a Address
	path, _ := n.Take("path")
	host, _ := n.Take("host")
	port, hasPort := n.Take("port")
	server := n.TakeSub("server")
	switch {
	case path != "" && host != "":
		return a, errors.New("path and host may not be used at the same time")
	case path != "":
		server["type"], server["path"] = "unix", path
	case host != "":
		server["type"], server["host"], server["port"] = "inet", host, wire.DefaultPort
		if hasPort {
			server["port"] = port
		}
	}
	if len(server) == 0 {
		return a, errors.New("NBD server address missing")
	}
	need := func(names ...string) error {
		for _, name := range names {
			if _, ok := server[name]; !ok {
				return fmt.Errorf("Parameter '%s' is missing", name)
			}
		}
		return nil
	}
	if err := need("type"); err != nil {
		return a, err
	}
	switch kind := server["type"]; kind {
	case "unix":
		a.Path = server["path"]
		return a, need("path")
	case "inet":
		a.Host, a.Port = server["host"], server["port"]
		if a.Host == "" {
			a.Host = "localhost"
		}
		if err := need("host", "port"); err != nil {
			return a, err
		}
		if _, err := net.LookupPort("tcp", a.Port); err != nil {
			return a, fmt.Errorf("address resolution failed for %s: Servname not supported for ai_socktype", a)
		}
		return a, nil
	default:
		return a, fmt.Errorf("Parameter 'type' does not accept value '%s'", kind)
	}
}

func takeNumber(n *block.Node, name string) (uint64, error) {
	text, ok := n.Take(name)
	if !ok {
		return 0, nil
	}
	v, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("Parameter '%s' expects a number", name)
	}
	return v, nil
}

func takeSeconds(n *block.Node, name string) (time.Duration, error) {
	v, err := takeNumber(n, name)
	return time.Duration(v) * time.Second, err
}

func takeTLS(n *block.Node) (*tls.Config, error) {
	id, given := n.Take("tls-creds")
	on, err := n.TakeBool("tls", given)
	if err != nil || !on {
		return nil, err
	}
	if !given {
		return &tls.Config{MinVersion: tls.VersionTLS12}, nil
	}
	creds, err := n.Object(ObjectTLS, id)
	if errors.Is(err, block.ErrNoObject) {
		return nil, fmt.Errorf("No TLS credentials with id '%s'", id)
	}
	if err != nil {
		return nil, err
	}
	config, ok := creds.(*tls.Config)
	if !ok {
		return nil, fmt.Errorf("Object with id '%s' is not TLS credentials", id)
	}
	return config, nil
}
