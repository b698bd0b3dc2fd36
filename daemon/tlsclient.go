package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
)

// Files of a folder with TLS credentials that a client has of its own, if the server wants to know who it is.
const (
	clientCertFile = "client-cert.pem"
	clientKeyFile  = "client-key.pem"
)

// LoadClientTLS reads the credentials of a client from a folder laid out like those of QEMU's tls-creds-x509: ca-cert.pem, which
// must have signed the server's certificate unless verifyPeer is false, and client-cert.pem with client-key.pem, if they are
// there.
func LoadClientTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	fail := func(err error) (*tls.Config, error) {
		return nil, fmt.Errorf("TLS credentials in %q: %w", dir, err)
	}
	authorities, err := loadCerts(dir, caCertFile)
	if err != nil {
		return fail(err)
	}
	// Without verification anybody can be the server: that is what was asked for.
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool(), InsecureSkipVerify: !verifyPeer}
	for _, ca := range authorities {
		config.RootCAs.AddCert(ca)
	}
	certPEM, err := readCredential(dir, clientCertFile)
	if errors.Is(err, fs.ErrNotExist) {
		return config, nil
	}
	if err != nil {
		return fail(err)
	}
	keyPEM, err := readCredential(dir, clientKeyFile)
	if err != nil {
		return fail(err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return fail(fmt.Errorf("%s with %s: %w", clientKeyFile, clientCertFile, err))
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}
