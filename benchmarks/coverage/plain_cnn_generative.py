"""Generative convolutional nets: GANs, autoencoders, autoregressive and diffusion models."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmarks.coverage.case import Case
from benchmarks.coverage.plain_inputs import given, integers, normal
from torch.nn.utils import spectral_norm


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        m.weight.data.normal_(0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        m.weight.data.normal_(1.0, 0.02)
        m.bias.data.fill_(0)


class DCGANGenerator(nn.Module):
    """The PyTorch tutorial's generator: transposed convolutions from a 1x1 latent."""

    def __init__(self, nz=20, ngf=8, nc=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.apply(weights_init)

    def forward(self, input):
        return self.main(input)


class DCGANDiscriminator(nn.Module):
    """view(-1, 1).squeeze(1) at the end."""

    def __init__(self, ndf=16, nc=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )
        self.apply(weights_init)

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


class SNDiscriminator(nn.Module):
    """christiancosgrove's: spectral norm everywhere, view(-1, w_g * w_g * 64)."""

    def __init__(self, w_g=4):
        super().__init__()
        self.w_g = w_g
        self.conv1 = spectral_norm(nn.Conv2d(3, 16, 3, stride=1, padding=(1, 1)))
        self.conv2 = spectral_norm(nn.Conv2d(16, 32, 4, stride=2, padding=(1, 1)))
        self.conv3 = spectral_norm(nn.Conv2d(32, 32, 3, stride=1, padding=(1, 1)))
        self.conv4 = spectral_norm(nn.Conv2d(32, 64, 4, stride=2, padding=(1, 1)))
        self.fc = spectral_norm(nn.Linear(w_g * w_g * 64, 1))

    def forward(self, x):
        m = nn.LeakyReLU(0.1)(self.conv1(x))
        m = nn.LeakyReLU(0.1)(self.conv2(m))
        m = nn.LeakyReLU(0.1)(self.conv3(m))
        m = nn.LeakyReLU(0.1)(self.conv4(m))
        return self.fc(m.view(-1, self.w_g * self.w_g * 64))


class WGANCritic(nn.Module):
    """WGAN-GP's critic with layer norm over (C, H, W), as its paper asks."""

    def __init__(self, dim=16):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, dim, 5, 2, 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(dim, 2 * dim, 5, 2, 2),
            nn.LayerNorm([2 * dim, 4, 4]),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * dim, 2 * dim, 5, 2, 2),
            nn.InstanceNorm2d(2 * dim, affine=True),
            nn.LeakyReLU(0.2),
        )
        self.output = nn.Linear(2 * dim * 2 * 2, 1)

    def forward(self, img):
        out = self.net(img)
        return self.output(out.view(out.size(0), -1)).view(-1)


class ConvAutoencoder(nn.Module):
    """The MNIST autoencoder with Unflatten."""

    def __init__(self, encoded_space_dim=16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.Flatten(start_dim=1),
            nn.Linear(7 * 7 * 32, 64),
            nn.ReLU(True),
            nn.Linear(64, encoded_space_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(encoded_space_dim, 64),
            nn.ReLU(True),
            nn.Linear(64, 7 * 7 * 32),
            nn.ReLU(True),
            nn.Unflatten(dim=1, unflattened_size=(32, 7, 7)),
            nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),
        )

    def forward(self, x):
        return torch.sigmoid(self.decoder(self.encoder(x)))


class ConvVAE(nn.Module):
    """chunk(2, dim=1) into mu and logvar, clamp, randn_like; view(-1, 32, 4, 4) in the decoder."""

    def __init__(self, z_dim=12):
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1), nn.ReLU(), nn.Conv2d(24, 32, 4, 2, 1), nn.ReLU()
        )
        self.to_latent = nn.Linear(32 * 4 * 4, 2 * z_dim)
        self.from_latent = nn.Linear(z_dim, 32 * 4 * 4)
        self.dec = nn.Sequential(
            nn.ConvTranspose2d(32, 24, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 3, 4, 2, 1)
        )

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps.mul(std).add_(mu)

    def forward(self, x):
        h = self.enc(x).flatten(1)
        mu, logvar = self.to_latent(h).chunk(2, dim=1)
        logvar = logvar.clamp(-10, 10)
        z = self.reparameterize(mu, logvar)
        h = self.from_latent(z).view(-1, 32, 4, 4)
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return torch.sigmoid(self.dec(h)), mu, logvar, kld


class VectorQuantizer(nn.Module):
    """zalandoresearch: distances, argmin, one-hot by scatter_, straight-through."""

    def __init__(self, num_embeddings, embedding_dim, commitment_cost=0.25):
        super().__init__()
        self._embedding_dim = embedding_dim
        self._num_embeddings = num_embeddings
        self._embedding = nn.Embedding(self._num_embeddings, self._embedding_dim)
        self._embedding.weight.data.uniform_(-1 / self._num_embeddings, 1 / self._num_embeddings)
        self._commitment_cost = commitment_cost

    def forward(self, inputs):
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
        input_shape = inputs.shape
        flat_input = inputs.view(-1, self._embedding_dim)
        distances = (
            torch.sum(flat_input**2, dim=1, keepdim=True)
            + torch.sum(self._embedding.weight**2, dim=1)
            - 2 * torch.matmul(flat_input, self._embedding.weight.t())
        )
        encoding_indices = torch.argmin(distances, dim=1).unsqueeze(1)
        encodings = torch.zeros(
            encoding_indices.shape[0], self._num_embeddings, device=inputs.device
        )
        encodings.scatter_(1, encoding_indices, 1)
        quantized = torch.matmul(encodings, self._embedding.weight).view(input_shape)
        e_latent_loss = F.mse_loss(quantized.detach(), inputs)
        q_latent_loss = F.mse_loss(quantized, inputs.detach())
        loss = q_latent_loss + self._commitment_cost * e_latent_loss
        quantized = inputs + (quantized - inputs).detach()
        avg_probs = torch.mean(encodings, dim=0)
        perplexity = torch.exp(-torch.sum(avg_probs * torch.log(avg_probs + 1e-10)))
        return loss, quantized.permute(0, 3, 1, 2).contiguous(), perplexity


class VQVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self._encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 1, 1), nn.ReLU()
        )
        self._pre_vq_conv = nn.Conv2d(48, 16, 1)
        self._vq_vae = VectorQuantizer(20, 16)
        self._decoder = nn.Sequential(
            nn.Conv2d(16, 48, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(48, 3, 4, 2, 1)
        )

    def forward(self, x):
        z = self._pre_vq_conv(self._encoder(x))
        loss, quantized, perplexity = self._vq_vae(z)
        return loss, self._decoder(quantized), perplexity


class MaskedConv2d(nn.Conv2d):
    """jzbontar/pixelcnn-pytorch: a buffer cloned from the weight, applied to weight.data."""

    def __init__(self, mask_type, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", self.weight.data.clone())
        _, _, kH, kW = self.weight.size()
        self.mask.fill_(1)
        self.mask[:, :, kH // 2, kW // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, kH // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def pixel_cnn(fm=32):
    return nn.Sequential(
        MaskedConv2d("A", 1, fm, 7, 1, 3, bias=False),
        nn.BatchNorm2d(fm),
        nn.ReLU(True),
        MaskedConv2d("B", fm, fm, 7, 1, 3, bias=False),
        nn.BatchNorm2d(fm),
        nn.ReLU(True),
        MaskedConv2d("B", fm, fm, 7, 1, 3, bias=False),
        nn.BatchNorm2d(fm),
        nn.ReLU(True),
        nn.Conv2d(fm, 16, 1),
    )


class ModulatedConv2d(nn.Module):
    """rosinality's StyleGAN2 layer: the weight modulated per sample, one grouped convolution."""

    def __init__(self, in_channel, out_channel, kernel_size, style_dim, demodulate=True):
        super().__init__()
        self.eps = 1e-8
        self.kernel_size = kernel_size
        self.in_channel = in_channel
        self.out_channel = out_channel
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(
            torch.randn(1, out_channel, in_channel, kernel_size, kernel_size)
        )
        self.modulation = nn.Linear(style_dim, in_channel)
        self.demodulate = demodulate

    def forward(self, input, style):
        batch, in_channel, height, width = input.shape
        style = self.modulation(style).view(batch, 1, in_channel, 1, 1)
        weight = self.scale * self.weight * style
        if self.demodulate:
            demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * demod.view(batch, self.out_channel, 1, 1, 1)
        weight = weight.view(
            batch * self.out_channel, in_channel, self.kernel_size, self.kernel_size
        )
        input = input.view(1, batch * in_channel, height, width)
        out = F.conv2d(input, weight, padding=self.padding, groups=batch)
        _, _, height, width = out.shape
        return out.view(batch, self.out_channel, height, width)


class StyleGenerator(nn.Module):
    """Mapping network with pixel norm, a learned constant, noise, modulated convolutions."""

    def __init__(self, style_dim=24, channels=(32, 24)):
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(16, 40), nn.LeakyReLU(0.2), nn.Linear(40, style_dim), nn.LeakyReLU(0.2)
        )
        self.const = nn.Parameter(torch.randn(1, channels[0], 4, 4))
        self.conv1 = ModulatedConv2d(channels[0], channels[0], 3, style_dim)
        self.noise1 = nn.Parameter(torch.zeros(1))
        self.conv2 = ModulatedConv2d(channels[0], channels[1], 3, style_dim)
        self.to_rgb = ModulatedConv2d(channels[1], 3, 1, style_dim, demodulate=False)

    def forward(self, z):
        z = z * torch.rsqrt(torch.mean(z**2, dim=1, keepdim=True) + 1e-8)
        w = self.mapping(z)
        x = self.const.repeat(z.shape[0], 1, 1, 1)
        x = self.conv1(x, w)
        noise = x.new_empty(x.shape[0], 1, x.shape[2], x.shape[3]).normal_()
        x = F.leaky_relu(x + self.noise1 * noise, 0.2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.leaky_relu(self.conv2(x, w), 0.2)
        return self.to_rgb(x, w)


class ConditionalGenerator(nn.Module):
    """The conditional GAN of eriklindernoren: label embedding, cat, img.view(size(0), *shape)."""

    def __init__(self, img_shape=(1, 8, 8), n_classes=10, latent_dim=12):
        super().__init__()
        self.img_shape = img_shape
        self.label_emb = nn.Embedding(n_classes, n_classes)

        def block(in_feat, out_feat, normalize=True):
            layers = [nn.Linear(in_feat, out_feat)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_feat, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim + n_classes, 32, normalize=False),
            *block(32, 48),
            *block(48, 64),
            nn.Linear(64, int(math.prod(img_shape))),
            nn.Tanh(),
        )

    def forward(self, noise, labels):
        gen_input = torch.cat((self.label_emb(labels), noise), -1)
        img = self.model(gen_input)
        return img.view(img.size(0), *self.img_shape)


CASES: tuple[Case, ...] = (
    Case("plain/dcgan_generator", DCGANGenerator, given(normal(4, 20, 1, 1))),
    Case("plain/dcgan_discriminator", DCGANDiscriminator, given(normal(4, 3, 16, 16))),
    Case("plain/sn_discriminator", SNDiscriminator, given(normal(4, 3, 16, 16))),
    Case("plain/wgan_critic", WGANCritic, given(normal(4, 1, 16, 16))),
    Case("plain/conv_autoencoder", ConvAutoencoder, given(normal(4, 1, 28, 28))),
    Case("plain/conv_vae", ConvVAE, given(normal(4, 3, 16, 16))),
    Case("plain/vq_vae", VQVAE, given(normal(2, 3, 16, 16))),
    Case("plain/pixel_cnn", pixel_cnn, given(normal(2, 1, 8, 8))),
    Case("plain/stylegan2", StyleGenerator, given(normal(3, 16))),
    Case("plain/conditional_gan", ConditionalGenerator, given(normal(4, 12), integers(10, 4))),
)
