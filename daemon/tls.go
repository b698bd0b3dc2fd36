package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Files of a folder with TLS credentials, as QEMU's tls-creds-x509 has them.
const (
	caCertFile     = "ca-cert.pem"
	caRevokedFile  = "ca-crl.pem"
	serverCertFile = "server-cert.pem"
	serverKeyFile  = "server-key.pem"
)

// maxCredential bounds such a file.
const maxCredential = 4 << 20

// LoadTLS reads the credentials of a server from a folder laid out like those of QEMU's tls-creds-x509: server-cert.pem
// (with the certificates between it and the CA behind it), server-key.pem, and, if verifyPeer, ca-cert.pem, which must
// have signed the certificate of each client, and ca-crl.pem, if it is there, which lists those that do not count any
// more. The files are read once; LoadCredentials is for those that are renewed.
func LoadTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	fail := func(err error) (*tls.Config, error) {
		return nil, fmt.Errorf("TLS credentials in %q: %w", dir, err)
	}
	cert, err := loadServerCert(dir, time.Now())
	if err != nil {
		return fail(err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS12,
		// Connections are few and long. Without tickets each is verified in full.
		SessionTicketsDisabled: true,
	}
	if !verifyPeer {
		return config, nil
	}
	authorities, err := loadCerts(dir, caCertFile)
	if err != nil {
		return fail(err)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.ClientCAs = x509.NewCertPool()
	for _, ca := range authorities {
		if !ca.IsCA {
			return fail(fmt.Errorf("%s: the certificate of %q is not that of a certificate authority", caCertFile, ca.Subject))
		}
		config.ClientCAs.AddCert(ca)
	}
	revoked, err := loadRevoked(dir, authorities, time.Now())
	if err != nil {
		return fail(err)
	}
	if revoked != nil {
		config.VerifyConnection = revoked.verify
	}
	return config, nil
}

// loadServerCert reads the server's certificate and key, and looks for what would make every client turn away.
func loadServerCert(dir string, now time.Time) (tls.Certificate, error) {
	certPEM, err := readCredential(dir, serverCertFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	keyPEM, err := readCredential(dir, serverKeyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	certs, err := parseCerts(serverCertFile, certPEM)
	if err != nil {
		return tls.Certificate{}, err
	}
	if err := checkServerCert(certs[0], now); err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", serverCertFile, err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s with %s: %w", serverKeyFile, serverCertFile, err)
	}
	return pair, nil
}

func checkServerCert(cert *x509.Certificate, now time.Time) error {
	switch {
	case now.After(cert.NotAfter):
		return fmt.Errorf("the certificate has expired on %s", cert.NotAfter.Format(time.DateOnly))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", cert.NotBefore.Format(time.RFC3339))
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) == 0:
		return nil
	}
	for _, usage := range cert.ExtKeyUsage {
		if usage == x509.ExtKeyUsageServerAuth || usage == x509.ExtKeyUsageAny {
			return nil
		}
	}
	return errors.New("the certificate is not meant for a server (its extended key usage does not say so)")
}

func loadCerts(dir, name string) ([]*x509.Certificate, error) {
	p, err := readCredential(dir, name)
	if err != nil {
		return nil, err
	}
	return parseCerts(name, p)
}

// parseCerts returns the certificates in a PEM file, at least one.
func parseCerts(name string, p []byte) ([]*x509.Certificate, error) {
	var list []*x509.Certificate
	for block, rest := pem.Decode(p); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		list = append(list, cert)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: no certificate in PEM form in it", name)
	}
	return list, nil
}

func readCredential(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: %w", name, fs.ErrNotExist)
	}
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxCredential {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", name, maxCredential)
	}
	return os.ReadFile(path)
}

// revocations are the certificates that do not count any more, by issuer and serial number.
type revocations map[string]bool

func revocationKey(issuer []byte, serial fmt.Stringer) string {
	return string(issuer) + "\x00" + serial.String()
}

// loadRevoked reads the revocation lists of a folder. They are nil if it has none, and must be signed by one of the
// authorities and still be in force: a list that nobody renews says nothing about what was revoked since.
func loadRevoked(dir string, authorities []*x509.Certificate, now time.Time) (revocations, error) {
	p, err := readCredential(dir, caRevokedFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	revoked := make(revocations)
	lists := 0
	for block, rest := pem.Decode(p); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "X509 CRL" {
			continue
		}
		lists++
		crl, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", caRevokedFile, err)
		}
		if !signedByOne(crl, authorities) {
			return nil, fmt.Errorf("%s: the list of %q is signed by none of the authorities in %s", caRevokedFile, crl.Issuer, caCertFile)
		}
		if !crl.NextUpdate.IsZero() && now.After(crl.NextUpdate) {
			return nil, fmt.Errorf("%s: the list has expired on %s", caRevokedFile, crl.NextUpdate.Format(time.DateOnly))
		}
		for _, e := range crl.RevokedCertificateEntries {
			revoked[revocationKey(crl.RawIssuer, e.SerialNumber)] = true
		}
	}
	if lists == 0 {
		return nil, fmt.Errorf("%s: no revocation list in PEM form in it", caRevokedFile)
	}
	return revoked, nil
}

func signedByOne(crl *x509.RevocationList, authorities []*x509.Certificate) bool {
	for _, ca := range authorities {
		if crl.CheckSignatureFrom(ca) == nil {
			return true
		}
	}
	return false
}

var errRevoked = errors.New("the client's certificate is revoked")

// verify refuses a client if each way from its certificate to an authority leads over one that is revoked.
func (r revocations) verify(state tls.ConnectionState) error {
	for _, chain := range state.VerifiedChains {
		if !r.any(chain) {
			return nil
		}
	}
	return errRevoked
}

func (r revocations) any(chain []*x509.Certificate) bool {
	for _, cert := range chain {
		if r[revocationKey(cert.RawIssuer, cert.SerialNumber)] {
			return true
		}
	}
	return false
}
